"""The journal: a batch counts once, receipts never run ahead of it, and a crash leaves whole records."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from side_trainer.journal.journal import FILE_NAME, Arrived, Claim, Journal, Taken
from side_trainer.journal.records import StreamState
from sidestream.contract.errors import StateError

STREAM = "a" * 32


def batch(sequence: int, **changes: Any) -> Arrived:
    """Two samples, of a device that keeps to one history."""
    history = changes.pop("history", "")
    fields: dict[str, Any] = {
        "tier": "t",
        "device": "d",
        "stream": STREAM,
        "sequence": sequence,
        "floor": 1,
        "content": f"{history}{sequence}",
        "previous": f"{history}{sequence - 1}" if sequence > 1 else "",
        "samples": 2,
        "keys": (),
        "payload": b"xy",
        "select": lambda rows: bytes(b"xy"[row] for row in rows),
    }
    return Arrived(**{**fields, **changes})


def take(journal: Journal, sequence: int, **changes: Any) -> Taken:
    held = changes.pop("held", False)
    with journal.transaction():
        return journal.append_batch(batch(sequence, **changes), held=held)


def put(journal: Journal, sequence: int, **changes: Any) -> bool:
    return take(journal, sequence, **changes).claim is Claim.NEW


def watermark(journal: Journal, stream: str = STREAM) -> int:
    state = journal.stream(stream)
    return state.watermark if state else 0


def test_a_batch_counts_once_however_often_it_comes(journal: Journal) -> None:
    taken = [take(journal, 1) for _ in range(3)]
    assert taken == [Taken(Claim.NEW, 2, offset=1), Taken(Claim.KNOWN), Taken(Claim.KNOWN)]
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
@settings(max_examples=60)
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
    assert take(journal, 1, device="copy").claim is Claim.FORKED
    assert take(journal, 2, device="copy").claim is Claim.FORKED
    assert put(journal, 2)


def test_an_identity_is_not_believed_without_its_content(journal: Journal) -> None:
    put(journal, 1)
    assert take(journal, 1).claim is Claim.KNOWN
    assert take(journal, 1, history="b").claim is Claim.FORKED
    assert journal.samples() == 2


def test_of_two_histories_of_a_stream_the_journal_takes_one(journal: Journal) -> None:
    put(journal, 1)
    put(journal, 3, history="b")
    assert take(journal, 2).claim is Claim.FORKED, "what follows it is of another history"
    assert put(journal, 2, history="b", previous="1")
    assert take(journal, 4).claim is Claim.FORKED, "what it follows is of another history"
    assert put(journal, 4, history="b") and watermark(journal) == 4


def test_what_was_given_up_is_never_taken_later(journal: Journal) -> None:
    put(journal, 5, floor=5)
    assert take(journal, 3).claim is Claim.FORKED and watermark(journal) == 5


def test_a_floor_is_believed_of_a_batch_that_comes_again_and_not_of_another_history(
    journal: Journal,
) -> None:
    put(journal, 1)
    put(journal, 4)
    assert take(journal, 4, history="b", floor=4).claim is Claim.FORKED and watermark(journal) == 1
    assert take(journal, 4, floor=4).claim is Claim.KNOWN and watermark(journal) == 4
    assert take(journal, 4, floor=1).claim is Claim.KNOWN and watermark(journal) == 4, "it only rises"


def test_whoever_keeps_no_chain_is_known_by_each_batch_alone(journal: Journal) -> None:
    for sequence in (2, 1, 3):
        assert put(journal, sequence, previous="")
    assert take(journal, 2, history="b", previous="").claim is Claim.FORKED and watermark(journal) == 3


def test_batches_that_are_not_neighbours_are_not_held_against_each_other(journal: Journal) -> None:
    put(journal, 3)
    assert put(journal, 1, history="b") and put(journal, 5, history="c")
    assert put(journal, 9, stream="b" * 32) and put(journal, 4, stream="b" * 32, history="b")


def test_a_sample_counts_once_in_whatever_batch_of_whatever_stream(journal: Journal) -> None:
    keys = [bytes([n]) * 8 for n in range(4)]
    assert take(journal, 1, keys=keys[:2]) == Taken(Claim.NEW, 2, 0, offset=1)
    assert take(journal, 1, stream="b" * 32, keys=keys[1:3]) == Taken(Claim.NEW, 1, 1)
    assert take(journal, 2, stream="b" * 32, keys=keys[:2]) == Taken(Claim.NEW, 0, 2)
    assert take(journal, 2, stream="b" * 32, keys=keys[:2]).claim is Claim.KNOWN
    assert [(one.samples, one.payload) for one in journal.read(0)] == [(2, b"xy"), (1, b"y")]
    assert watermark(journal, "b" * 32) == 2 and journal.samples() == 3


def test_a_held_sample_counts_as_one_that_came(journal: Journal) -> None:
    keys = [bytes([n]) * 8 for n in range(2)]
    put(journal, 1, keys=keys, held=True)
    assert take(journal, 2, keys=keys).repeated == 2 and journal.tail == 0


def test_a_held_batch_has_its_place_in_its_stream_like_any_other_and_after_its_release_too(
    journal: Journal,
) -> None:
    assert put(journal, 1, held=True) and put(journal, 2, held=True)
    for _ in range(2):
        for held in (True, False):
            assert take(journal, 2, held=held).claim is Claim.KNOWN
            assert take(journal, 2, history="b", held=held).claim is Claim.FORKED
        assert take(journal, 3, history="b").claim is Claim.FORKED, "what it follows is of another history"
        journal.holding.release("d")
    assert watermark(journal) == 2 and journal.samples() == 4
    assert [(one.offset, one.payload) for one in journal.read(0)] == [(1, b"xy"), (2, b"xy")]


def test_what_a_stream_comes_to_is_counted_without_what_was_left_out(journal: Journal) -> None:
    keys = [bytes([n]) * 8 for n in range(3)]
    put(journal, 1, keys=keys[:2])
    put(journal, 2, keys=keys[1:])
    put(journal, 1, stream="b" * 32, device="c")
    counted = {"saved": 0, "samples": 3, "batches": 2, "bytes": 3}
    ours = StreamState(stream=STREAM, device="d", watermark=2, **counted)
    assert journal.stream(STREAM) == ours and journal.stream("c" * 32) is None
    assert [one.device for one in journal.streams()] == ["c", "d"] and journal.streams()[1] == ours
    assert journal.samples() == 5
    assert journal.content(STREAM, 2) == "2" and journal.content(STREAM, 3) == ""


def test_records_of_all_kinds_stand_in_one_order(journal: Journal) -> None:
    assert journal.append("settings", b"{}") == 1
    with journal.transaction():
        assert journal.append("labels", b"[]") == 2
        journal.append_batch(batch(1))
    assert journal.append("tier", b"x", tier="u") == 4
    assert journal.tail == 4
    told = [(one.offset, one.kind, one.tier, one.samples, one.payload, one.stream) for one in journal.read(1)]
    assert told == [
        (2, "labels", None, 0, b"[]", None),
        (3, "batch", "t", 2, b"xy", STREAM),
        (4, "tier", "u", 0, b"x", None),
    ]
    assert [one.offset for one in journal.read(1, limit=2)] == [2, 3]
    put(journal, 2, tier="u")
    assert journal.batches(2) == [] and journal.batches(3) == [(3, 2)]
    assert journal.batches(5) == [(3, 2), (5, 2)]
    others = [[one.offset for one in journal.others(upto, ("labels", "tier"))] for upto in (1, 3, 5)]
    assert others == [[], [2], [2, 4]]
    assert journal.get(2).payload == b"[]"
    for missing in (0, 6):
        with pytest.raises(StateError, match=f"record {missing} is missing"):
            journal.get(missing)


def test_a_record_of_a_transaction_that_fails_leaves_its_offset_to_the_next(journal: Journal) -> None:
    with pytest.raises(ZeroDivisionError), journal.transaction():
        journal.append("labels", b"[]")
        raise ZeroDivisionError
    assert journal.append("tier", b"x") == 1 and len(journal.read(0)) == 1


def test_a_transaction_that_fails_leaves_nothing(journal: Journal) -> None:
    with pytest.raises(ZeroDivisionError), journal.transaction():
        journal.append_batch(batch(1))
        raise ZeroDivisionError
    assert journal.tail == 0 and put(journal, 1) and journal.tail == 1


def test_offsets_go_on_without_gaps_after_reopening(tmp_path: Path) -> None:
    first = Journal(tmp_path / FILE_NAME)
    put(first, 1)
    put(first, 2)
    run = first.run
    first.close()
    again = Journal(tmp_path / FILE_NAME)
    assert again.run == run and again.tail == 2
    put(again, 3)
    assert [record.offset for record in again.read(0)] == [1, 2, 3]
    for epoch in (1, 2):
        again.epoch += 1
        assert again.epoch == epoch
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
        journal.append_batch(batch(2, payload=b"x" * 10**6))
    assert journal.tail == 1 and watermark(journal) == 1
    journal.db.execute("PRAGMA max_page_count = 1000000")
    assert put(journal, 2) and watermark(journal) == 2


@pytest.mark.parametrize("changed", ["payload = x'6f'", "payload = CAST(payload AS TEXT)", "digest = x'6f'"])
def test_a_byte_that_changed_on_the_disk_is_noticed(journal: Journal, changed: str) -> None:
    put(journal, 1)
    journal.db.execute(f"UPDATE records SET {changed}")
    with pytest.raises(StateError, match="record 1 has changed; restore"):
        journal.read(0)


def test_a_journal_that_cannot_be_read_any_more_is_a_state_error_with_the_remedy(journal: Journal) -> None:
    journal.db.execute("DROP TABLE records")
    with pytest.raises(StateError, match=r"cannot be read.*restore"):
        journal.read(0)


def test_a_transaction_has_the_file_to_itself_from_its_beginning(journal: Journal) -> None:
    with (
        contextlib.closing(sqlite3.connect(journal.path, timeout=0.0)) as other,
        journal.transaction(),
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        other.execute("BEGIN IMMEDIATE")


def test_several_threads_append_one_after_another(journal: Journal) -> None:
    with ThreadPoolExecutor(4) as pool:
        offsets = list(pool.map(lambda _: journal.append("idle", b"{}"), range(12)))
    assert sorted(offsets) == list(range(1, 13))


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


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    journal = Journal(path)
    journal.set_meta("format", "1")
    journal.close()
    for read_only in (False, True):
        with pytest.raises(StateError, match="another version of Sidestream"):
            Journal(path, read_only=read_only)


def test_a_new_journal_is_its_owners_alone(journal: Journal) -> None:
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600


def test_every_commit_reaches_the_disk(journal: Journal) -> None:
    assert journal.db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert journal.db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
