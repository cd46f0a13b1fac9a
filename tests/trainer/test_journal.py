"""The journal: a batch counts once, receipts never run ahead of it, and a crash leaves whole records."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.errors import MismatchError, StateError
from side_trainer.journal import FILE_NAME, Journal

STREAM = "a" * 32


def put(journal: Journal, sequence: int, *, floor: int = 1, stream: str = STREAM, device: str = "d") -> bool:
    with journal.transaction():
        return journal.append_batch(
            b"x",
            tier="t",
            device=device,
            stream=stream,
            sequence=sequence,
            floor=floor,
            samples=2,
        )


def watermark(journal: Journal, stream: str = STREAM) -> int:
    state = journal.stream(stream)
    return state.watermark if state else 0


def test_a_batch_counts_once_however_often_it_comes(journal: Journal) -> None:
    assert put(journal, 1) and not put(journal, 1) and not put(journal, 1)
    assert journal.samples() == 2 and len(journal.batches(journal.tail)) == 1


def test_the_watermark_stops_before_a_gap_and_jumps_when_it_closes(journal: Journal) -> None:
    put(journal, 1)
    put(journal, 3)
    assert watermark(journal) == 1
    put(journal, 2)
    assert watermark(journal) == 3


def test_a_floor_passes_over_what_the_device_gave_up(journal: Journal) -> None:
    put(journal, 7, floor=5)
    assert watermark(journal) == 4
    put(journal, 8, floor=7)
    assert watermark(journal) == 8
    assert not put(journal, 6), "given up: the device counted it as dropped"


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(arrivals=st.lists(st.integers(1, 12), max_size=40))
def test_whatever_the_order_and_repeats_each_sequence_is_journaled_once(
    tmp_path_factory: pytest.TempPathFactory, arrivals: list[int]
) -> None:
    journal = Journal(tmp_path_factory.mktemp("j") / FILE_NAME)
    try:
        new = [sequence for sequence in arrivals if put(journal, sequence)]
        assert sorted(new) == sorted(set(arrivals))
        expected = 0
        while expected + 1 in arrivals:
            expected += 1
        assert watermark(journal) == expected
    finally:
        journal.close()


def test_a_stream_belongs_to_one_device(journal: Journal) -> None:
    put(journal, 1)
    with pytest.raises(MismatchError, match="belongs to device 'd'"):
        put(journal, 2, device="intruder")
    assert put(journal, 2)


def test_a_transaction_that_fails_leaves_nothing(journal: Journal) -> None:
    with pytest.raises(ZeroDivisionError), journal.transaction():
        journal.append_batch(b"x", tier="t", device="d", stream=STREAM, sequence=1, floor=1, samples=1)
        raise ZeroDivisionError
    assert journal.tail == 0 and put(journal, 1) and journal.tail == 1


def test_offsets_go_on_without_gaps_after_reopening(tmp_path: Path) -> None:
    first = Journal(tmp_path / FILE_NAME)
    put(first, 1)
    run = first.run
    first.close()
    again = Journal(tmp_path / FILE_NAME)
    assert again.run == run and again.tail == 1
    put(again, 2)
    assert [record.offset for record in again.read(0)] == [1, 2]
    assert again.next_epoch() == 1 and again.next_epoch() == 2
    again.close()


def test_reading_what_is_no_journal_says_so(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no journal at"):
        Journal(tmp_path / "nothing.db", read_only=True)
    (tmp_path / "junk.db").write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(StateError, match="cannot be used"):
        Journal(tmp_path / "junk.db")


def test_a_full_disk_is_an_error_that_leaves_the_journal_usable(journal: Journal) -> None:
    put(journal, 1)
    pages = journal.db.execute("PRAGMA page_count").fetchone()[0]
    journal.db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(StateError, match="cannot be written to"), journal.transaction():
        journal.append_batch(
            b"x" * 10**6, tier="t", device="d", stream=STREAM, sequence=2, floor=1, samples=1
        )
    assert journal.tail == 1 and watermark(journal) == 1
    journal.db.execute("PRAGMA max_page_count = 1000000")
    assert put(journal, 2) and watermark(journal) == 2


def test_a_byte_that_changed_on_the_disk_is_noticed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / FILE_NAME)
    put(journal, 1)
    journal.db.execute("UPDATE records SET payload = x'6f'")
    with pytest.raises(StateError, match="record 1 has changed; restore"):
        journal.read(0)
    journal.close()


def test_a_damaged_page_is_noticed_when_a_trainer_starts(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    journal = Journal(path)
    for sequence in range(1, 30):
        put(journal, sequence)
    journal.close()
    data = bytearray(path.read_bytes())
    for page in range(1, len(data) // 4096):
        broken = bytearray(data)
        for index in range(4096 * page, 4096 * (page + 1)):
            broken[index] ^= 0xA5
        path.write_bytes(broken)
        with pytest.raises(StateError, match="restore the state directory"):
            Journal(path)
    path.write_bytes(data)
    Journal(path).close()


def test_a_journal_of_an_older_version_is_read_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    journal = Journal(path)
    put(journal, 1)
    journal.close()
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE records DROP COLUMN digest")
    db.close()
    old = Journal(path, read_only=True)
    assert [record.offset for record in old.read(0)] == [1]
    old.close()
    again = Journal(path)
    assert put(again, 2) and [record.offset for record in again.read(0)] == [1, 2]
    again.close()
