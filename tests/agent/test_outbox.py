from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edge_agent.samples.sample import Row, Sample
from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.store.outbox_file import FILE_NAME
from edge_agent.store.streams import Slot
from sidestream.contract.errors import StateError
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.wire import unpack
from tests.outboxes import message, receipt_for, refuse

BYTES = len(message(Slot("0" * 32, 1, 1, 0, "0" * 32)))
"""Of a batch with one sample."""


def open_outbox(folder: Path, **changes: Any) -> Outbox:
    settings = {"job": "lights", "device": "pi", "tier": "pi5", "max_bytes": 10_000, **changes}
    return Outbox(folder, **settings)


def put(outbox: Outbox, *keys: bytes, value: float = 1.0, width: int = 8) -> int:
    packed = partial(message, rows=len(keys), value=value, width=width)
    (sequence,) = outbox.append_all([(packed, len(keys))], Consumed(keys=list(keys)))
    return sequence


def settle(outbox: Outbox, upto: int, **changes: Any) -> list[int]:
    return list(outbox.streams.receipt(receipt_for(outbox, upto, **changes)).sequences)


def first(outbox: Outbox) -> ActivationBatch:
    return unpack(ActivationBatch, outbox.streams.waiting(0, 1)[0].payload)


def waiting(outbox: Outbox) -> list[int]:
    return [batch.sequence for batch in outbox.streams.waiting(0, 100)]


def test_a_batch_its_samples_and_its_counters_survive_together(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        stream = outbox.stream
        taken = Consumed(keys=[b"a", b"b"], forward_seconds=0.25)
        taken.counts["samples_forwarded"] = 2
        assert outbox.append_all([(partial(message, rows=2), 2)], taken) == [1]
    with open_outbox(tmp_path) as outbox:
        assert outbox.stream == stream and waiting(outbox) == [1]
        assert outbox.is_consumed(b"a") and outbox.is_consumed(b"b") and not outbox.is_consumed(b"c")
        outbox.consume(Consumed(keys=[b"b", b"c"]))
        assert outbox.is_consumed(b"b") and outbox.is_consumed(b"c")
        assert outbox.counters()["samples_forwarded"] == 2 and outbox.counters()["forward_seconds"] == 0.25


def test_a_batch_that_cannot_be_packed_leaves_no_trace(tmp_path: Path) -> None:
    def fails(slot: Slot) -> bytes:
        raise ValueError("no")

    with open_outbox(tmp_path) as outbox:
        with pytest.raises(ValueError, match="no"):
            outbox.append_all([(fails, 1)], Consumed(keys=[b"a"]))
        assert (
            not outbox.is_consumed(b"a")
            and outbox.streams.current.next_sequence == 1
            and put(outbox, b"a") == 1
        )


def test_sequences_and_sample_numbers_go_on_after_receipts_and_restarts(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        put(outbox, b"a", b"b")
        put(outbox, b"c")
        assert settle(outbox, 2) == [1, 2]
        assert outbox.streams.first_waiting() == 3
    with open_outbox(tmp_path) as outbox:
        assert put(outbox, b"d") == 3
        assert (first(outbox).sequence, first(outbox).sample_ids.tolist()) == (3, [3])


def test_receipts_are_cumulative_and_repeat_without_harm(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        for key in (b"a", b"b", b"c"):
            put(outbox, key)
        assert settle(outbox, 2) == [1, 2] and settle(outbox, 2) == [] and settle(outbox, 0) == []
        assert waiting(outbox) == [3] and outbox.size() == (1, len(outbox.streams.waiting(0, 1)[0].payload))


def test_a_refused_batch_goes_alone_and_is_counted(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        for key in (b"a", b"b", b"c"):
            put(outbox, key)
        assert refuse(outbox, 2) and not refuse(outbox, 2)
        assert waiting(outbox) == [1, 3] and outbox.streams.floor == 1
        assert outbox.counters()["batches_refused"] == 1


def test_a_full_outbox_says_so_until_receipts_make_room(tmp_path: Path) -> None:
    with open_outbox(tmp_path, max_bytes=int(2.5 * BYTES)) as outbox:
        for key in (b"a", b"b", b"c"):
            assert outbox.has_room()
            put(outbox, key)
        assert not outbox.has_room()
        settle(outbox, 1)
        assert outbox.has_room()
        assert outbox.counters()["batches_dropped"] == 0


def test_a_full_outbox_may_drop_its_oldest_batches_and_counts_them(tmp_path: Path) -> None:
    with open_outbox(tmp_path, max_bytes=int(2.5 * BYTES), when_full="drop_oldest") as outbox:
        put(outbox, b"a", b"b")
        for key in (b"c", b"d", b"e"):
            assert outbox.has_room()
            put(outbox, key)
        assert waiting(outbox) == [3, 4] and outbox.streams.floor == 3
        assert outbox.counters()["batches_dropped"] == 2 and outbox.counters()["samples_dropped"] == 3
        put(outbox, b"f", width=1000)
        assert waiting(outbox) == [5]


def test_held_out_samples_are_kept_in_order_and_not_twice(tmp_path: Path) -> None:
    held = [Sample(f"text {n}", "on" if n else None, bytes([n])) for n in range(5)]
    with open_outbox(tmp_path) as outbox:
        outbox.consume(Consumed(keys=[s.key for s in held], held_out=held))
        outbox.consume(Consumed(held_out=held[:2]))
    with open_outbox(tmp_path) as outbox:
        assert outbox.held_out(3) == [Row("text 0", None), Row("text 1", "on"), Row("text 2", "on")]


def test_births_are_counted_over_restarts(tmp_path: Path) -> None:
    for birth in (1, 2, 3):
        with open_outbox(tmp_path) as outbox:
            assert outbox.new_birth() == birth


def test_a_new_journal_of_the_trainer_starts_the_stream_over(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        assert outbox.begin_run("1" * 32) is False
        stream = outbox.stream
        put(outbox, b"a")
        assert outbox.begin_run("1" * 32) is False and waiting(outbox) == [1]
        assert outbox.begin_run("2" * 32) is True
        assert outbox.stream != stream and waiting(outbox) == [] and not outbox.is_consumed(b"a")
        assert put(outbox, b"a") == 1


def test_a_journal_that_comes_back_finds_its_own_stream_again(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        outbox.begin_run("1" * 32)
        first, births = outbox.stream, outbox.new_birth()
        put(outbox, b"a")
        put(outbox, b"b")
        settle(outbox, 1)
        outbox.begin_run("2" * 32)
        second = outbox.stream
        assert outbox.new_birth() == births + 1
        assert outbox.begin_run("1" * 32) is True
        assert outbox.stream == first and waiting(outbox) == [2] and outbox.is_consumed(b"a")
        assert put(outbox, b"c") == 3
        assert outbox.begin_run("2" * 32) is True and outbox.stream == second


def test_a_change_of_journals_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        outbox.begin_run("1" * 32)
        stream = outbox.stream
        put(outbox, b"a")
    (tmp_path / "agent.db").rename(tmp_path / f"agent-{'1' * 32}.db")
    with open_outbox(tmp_path) as outbox:
        assert outbox.begin_run("1" * 32) is True
        assert outbox.stream == stream and outbox.is_consumed(b"a")


def test_quick_counters_are_saved_on_closing(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        outbox.count("bytes_up", 5)
        assert outbox.counters()["bytes_up"] == 5
    with open_outbox(tmp_path) as outbox:
        outbox.count("bytes_up", 2)
        assert outbox.counters()["bytes_up"] == 7


@pytest.mark.parametrize("owner", [{"job": "heating"}, {"tier": "pi4"}])
def test_a_state_directory_with_batches_belongs_to_one_job_and_tier(
    tmp_path: Path, owner: dict[str, str]
) -> None:
    with open_outbox(tmp_path) as outbox:
        put(outbox, b"a")
    with pytest.raises(StateError, match=f"belongs to {next(iter(owner))}"):
        open_outbox(tmp_path, **owner)
    open_outbox(tmp_path).close()


def test_where_nothing_was_made_yet_another_job_device_or_tier_may_begin(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        outbox.begin_run("1" * 32)
    with open_outbox(tmp_path, job="heating", device="pi-2", tier="pi4") as outbox:
        outbox.begin_run("2" * 32)
        assert outbox.counters()["streams_forked"] == 0
        put(outbox, b"a")
    with pytest.raises(StateError, match="belongs to job 'heating'"):
        open_outbox(tmp_path)


def test_the_ruling_trainers_receipts_hold_though_an_earlier_one_had_a_higher_fence(tmp_path: Path) -> None:
    """As when a backup is restored on another machine, with a new broker and a clock that is behind."""
    with open_outbox(tmp_path) as outbox:
        for key in (b"a", b"b", b"c"):
            put(outbox, key)
        settle(outbox, 3, fence=9)
        behind = receipt_for(outbox, 1, fence=5)
        assert outbox.streams.receipt(behind).returned == 0
        assert outbox.streams.receipt(behind, ruling=True).returned == 2
        assert [waiting.sequence for waiting in outbox.streams.waiting(0, 9)] == [2, 3]
        again = receipt_for(outbox, 3, fence=5)
        assert outbox.streams.receipt(again, ruling=True).sequences == (2, 3)


def test_a_file_that_is_no_outbox_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database, but long enough to be looked at" * 30)
    with pytest.raises(StateError, match="not a database; put a copy of the state directory"):
        open_outbox(tmp_path)


def test_a_file_that_has_lost_its_streams_is_refused(tmp_path: Path) -> None:
    open_outbox(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute("DELETE FROM streams")
    db.close()
    with pytest.raises(StateError, match="is damaged: it has no stream; put a copy"):
        open_outbox(tmp_path)


def test_an_outbox_of_a_later_version_is_refused(tmp_path: Path) -> None:
    open_outbox(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StateError, match="another version of Sidestream"):
        open_outbox(tmp_path)


def test_every_commit_is_durable(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox, outbox._file.reading() as db:
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
