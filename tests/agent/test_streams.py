"""When the outbox's history and the journal's part, the device notices; what then becomes of its batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.store.streams import BatchState, Settled, Slot
from sidestream.contract.messages import MAX_STREAMS, ActivationBatch, Receipt, content_digest
from sidestream.contract.tensors import decode
from sidestream.contract.wire import unpack
from tests.outboxes import message, receipt_for, refuse

BYTES = len(message(Slot("0" * 32, 2, 1, 1, "0" * 32)))
"""Of a batch with one sample that is not the first."""
OTHER = "f" * 32
"""The digest of no batch of ours."""
NOTHING = Settled()


def open_outbox(folder: Path, **changes: Any) -> Outbox:
    settings = {"job": "lights", "device": "pi", "tier": "pi5", "max_bytes": 100 * BYTES, **changes}
    return Outbox(folder, **settings)


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with open_outbox(tmp_path) as outbox:
        yield outbox


def put(outbox: Outbox, *values: float, rows: int = 1) -> None:
    """A batch for each value, which fills its activations."""
    for value in values:
        outbox.append_all([(partial(message, rows=rows, value=value), rows)], Consumed())


def waiting(outbox: Outbox) -> dict[int, float]:
    """What waits: sequences, each with its value."""
    return {
        one.sequence: float(decode(unpack(ActivationBatch, one.payload).activations)[0, 0, 0])
        for one in outbox.streams.waiting(0, 1000)
    }


def batches(outbox: Outbox) -> list[ActivationBatch]:
    return [unpack(ActivationBatch, one.payload) for one in outbox.streams.waiting(0, 1000)]


def stored(outbox: Outbox) -> int:
    """Bytes of all payloads in the file."""
    with outbox._file.reading() as db:
        return int(db.execute("SELECT coalesce(sum(length(payload)), 0) FROM batches").fetchone()[0])


def hear(outbox: Outbox, upto: int, **changes: Any) -> Settled:
    """Of a trainer that has just what we made up to there, but for the changes."""
    return outbox.streams.receipt(receipt_for(outbox, upto, **changes))


def part(outbox: Outbox, **changes: Any) -> None:
    """Have the journal turn out to hold another history."""
    assert hear(outbox, outbox.streams.current.next_sequence, digest=OTHER, **changes).forked


# --- how it is noticed ----------------------------------------------------------------------------------


def test_a_receipt_for_a_batch_never_made_begins_a_new_stream_with_all_that_waits(
    outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    put(outbox, 10, 20)
    before = outbox.stream
    assert not hear(outbox, 2).forked, "the last one that was made"
    put(outbox, 30, 40)
    assert hear(outbox, 5, digest=OTHER) == Settled(forked=True)
    assert outbox.stream != before and waiting(outbox) == {1: 30, 2: 40}
    assert "2 batches that are not proved" in caplog.text
    assert outbox.counters()["streams_forked"] == 1


@pytest.mark.parametrize("digest", [OTHER, ""])
@pytest.mark.parametrize("receipted", [False, True])
def test_a_receipt_for_another_content_begins_a_new_stream(
    outbox: Outbox, digest: str, receipted: bool
) -> None:
    put(outbox, 10, 20)
    if receipted:
        hear(outbox, 1)
    before = outbox.stream
    assert hear(outbox, 1, digest=digest) == Settled(forked=True)
    assert outbox.stream != before
    assert waiting(outbox) == ({1: 20} if receipted else {1: 10, 2: 20}), "of what is not receipted"


def test_of_what_was_let_go_the_digest_is_remembered(tmp_path: Path) -> None:
    with open_outbox(tmp_path, keep_share=0.0) as outbox:
        put(outbox, 10, 20)
        hear(outbox, 1)
        assert outbox.streams.size(BatchState.KEPT) == (0, 0)
        assert hear(outbox, 1) == NOTHING
        assert hear(outbox, 1, digest=OTHER).forked


def test_of_what_was_given_up_the_journal_may_have_nothing_or_just_that(outbox: Outbox) -> None:
    put(outbox, 10, 20)
    refuse(outbox, 1)
    assert not hear(outbox, 1, digest="").forked and not hear(outbox, 1).forked
    assert waiting(outbox) == {2: 20}
    assert hear(outbox, 1, digest=OTHER).forked


def test_a_verdict_is_believed_of_a_batch_that_waits_under_just_that_content(outbox: Outbox) -> None:
    put(outbox, 10, 20, 30)
    hear(outbox, 1)
    before = outbox.stream
    first, second, third = (receipt_for(outbox, sequence).digest for sequence in (1, 2, 3))
    for sequence, digest in ((2, OTHER), (2, third), (1, first), (4, OTHER)):
        verdict = {"forked_sequence": sequence, "forked_digest": digest}
        assert hear(outbox, 2, **verdict) == NOTHING
        assert outbox.stream == before and waiting(outbox) == {2: 20, 3: 30}, "nothing was believed of it"
    assert hear(outbox, 1, forked_sequence=2, forked_digest=second) == Settled(forked=True)
    assert outbox.stream != before and waiting(outbox) == {1: 20, 2: 30}


def test_an_old_verdict_or_receipt_that_comes_again_does_nothing(outbox: Outbox) -> None:
    put(outbox, 10, 20)
    verdict = receipt_for(outbox, 0, forked_sequence=2, forked_digest=receipt_for(outbox, 2).digest)
    parted = receipt_for(outbox, 3, digest=OTHER)
    assert outbox.streams.receipt(verdict).forked
    stream = outbox.stream
    for retained in (verdict, parted, verdict):
        assert outbox.streams.receipt(retained) == NOTHING
    assert outbox.stream == stream and outbox.counters()["streams_forked"] == 1
    assert waiting(outbox) == {1: 10, 2: 20}


def test_receipts_for_streams_of_others_do_nothing(outbox: Outbox) -> None:
    put(outbox, 10)
    before = outbox.stream
    assert outbox.streams.receipt(Receipt(stream=OTHER, upto=7, digest=OTHER, fence=9)) == NOTHING
    assert outbox.stream == before and waiting(outbox) == {1: 10}


def test_what_a_trainer_of_a_lower_fence_says_does_nothing(outbox: Outbox) -> None:
    put(outbox, 10, 20, 30)
    assert hear(outbox, 1, fence=5).sequences == (1,)
    before = outbox.stream
    verdict = {"forked_sequence": 2, "forked_digest": receipt_for(outbox, 2).digest}
    for said in ({}, {"digest": OTHER}, verdict, {"saved": 2}):
        assert hear(outbox, 2, fence=4, **said) == NOTHING
    assert hear(outbox, 9, fence=4) == hear(outbox, 0, fence=4) == NOTHING
    assert (
        outbox.stream == before
        and waiting(outbox) == {2: 20, 3: 30}
        and outbox.streams.size(BatchState.KEPT)[0] == 1
    )
    assert hear(outbox, 2, fence=5).sequences == (2,), "the same trainer goes on"
    assert hear(outbox, 3, fence=6).sequences == (3,), "and so does the next one"


# --- the journal was set back ---------------------------------------------------------------------------


def test_receipted_batches_wait_again_only_if_a_trainer_that_was_started_anew_lacks_them(
    outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    put(outbox, 10, 20, 30)
    assert hear(outbox, 3, fence=5).sequences == (1, 2, 3)
    assert hear(outbox, 1, fence=5) == NOTHING, "an older receipt of the same trainer"
    assert hear(outbox, 3, fence=6) == NOTHING and not caplog.messages, "started anew, and lacks nothing"
    assert hear(outbox, 1, fence=7) == Settled(returned=2)
    assert waiting(outbox) == {2: 20, 3: 30} and outbox.streams.size(BatchState.KEPT)[0] == 1
    assert "2 batches" in caplog.text and "LOST" not in caplog.text
    assert hear(outbox, 1, fence=7) == hear(outbox, 1, fence=8) == NOTHING, "it was said already"
    assert hear(outbox, 2, fence=8).sequences == (2,)
    assert hear(outbox, 0, fence=9).returned == 2 and waiting(outbox) == {1: 10, 2: 20, 3: 30}
    assert outbox.counters()["samples_lost"] == 0


def test_batches_that_are_gone_are_counted_as_lost_once_and_the_floor_passes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_outbox(tmp_path, keep_share=0.0) as outbox:
        put(outbox, 10, 20, 30, rows=2)
        hear(outbox, 3, fence=1)
        assert outbox.streams.floor == 1, "nothing was given up so far"
        assert hear(outbox, 1, fence=2) == NOTHING and outbox.counters()["samples_lost"] == 4
        assert "4 samples are LOST" in caplog.text
        assert waiting(outbox) == {} and outbox.streams.floor == 4
        assert hear(outbox, 1, fence=3) == hear(outbox, 2, fence=4, digest="") == NOTHING
        assert hear(outbox, 0, fence=5) == NOTHING and outbox.counters()["samples_lost"] == 6
        put(outbox, 40)
        assert batches(outbox)[0].floor == 4


def test_of_what_the_journal_lacks_the_part_that_is_kept_waits_again(tmp_path: Path) -> None:
    with open_outbox(tmp_path, max_bytes=2 * BYTES) as outbox:
        put(outbox, 10, 20, 30)
        hear(outbox, 3, fence=1)
        assert outbox.streams.size(BatchState.KEPT) == (1, BYTES)
        assert hear(outbox, 0, fence=2) == Settled(returned=1) and outbox.counters()["samples_lost"] == 2
        assert waiting(outbox) == {3: 30} and outbox.streams.floor == 3 == batches(outbox)[0].floor


def test_what_was_made_meanwhile_is_sent_with_a_floor_that_leaves_what_waits_again_out(
    outbox: Outbox,
) -> None:
    put(outbox, 10, 20)
    refuse(outbox, 2)
    hear(outbox, 1, fence=1)
    put(outbox, 30)
    assert outbox.streams.floor == 3 == batches(outbox)[0].floor
    assert hear(outbox, 0, fence=2).returned == 1
    assert [(one.sequence, one.floor) for one in batches(outbox)] == [(1, 1), (3, 1)]


def test_what_an_earlier_stream_kept_waits_again_in_the_current_one(outbox: Outbox) -> None:
    put(outbox, 10, 20)
    whole, less = receipt_for(outbox, 2, fence=1), receipt_for(outbox, 1, fence=2)
    outbox.streams.receipt(whole)
    part(outbox, fence=1)
    put(outbox, 30)
    assert outbox.streams.receipt(less) == Settled(returned=1) and waiting(outbox) == {1: 30, 2: 20}
    assert outbox.streams.receipt(less) == NOTHING and waiting(outbox) == {1: 30, 2: 20}
    assert hear(outbox, 2, fence=2).sequences == (1, 2)


def test_a_receipt_speaks_for_its_own_stream_alone(outbox: Outbox) -> None:
    put(outbox, 10, 20)
    hear(outbox, 2, fence=1)
    part(outbox, fence=1)
    put(outbox, 30, 40)
    hear(outbox, 2, fence=1)
    assert hear(outbox, 1, fence=2) == Settled(returned=1) and waiting(outbox) == {2: 40}
    assert hear(outbox, 2, fence=2, saved=2).sequences == (2,)
    assert outbox.streams.size(BatchState.KEPT) == (2, stored(outbox)), "those of the stream before"


# --- what is kept ---------------------------------------------------------------------------------------


def test_what_is_in_a_backup_is_let_go_and_nothing_else(outbox: Outbox) -> None:
    put(outbox, 10, 20, 30, 40)
    hear(outbox, 3, saved=1)
    assert outbox.streams.size(BatchState.KEPT) == (2, 2 * BYTES)
    hear(outbox, 3, saved=4)
    assert outbox.streams.size(BatchState.KEPT) == (0, 0) and waiting(outbox) == {4: 40}, (
        "what waits is never let go"
    )
    assert stored(outbox) == outbox.size()[1]
    hear(outbox, 4, saved=3)
    assert outbox.streams.size(BatchState.KEPT) == (1, BYTES) and stored(outbox) == BYTES


def test_the_newest_receipted_batches_are_kept_within_their_share(tmp_path: Path) -> None:
    with open_outbox(tmp_path, max_bytes=4 * BYTES, keep_share=0.5) as outbox:
        for upto in range(1, 6):
            put(outbox, 10 * upto)
            hear(outbox, upto, fence=1)
        assert outbox.streams.size(BatchState.KEPT) == (2, 2 * BYTES) and stored(outbox) == 2 * BYTES
        assert hear(outbox, 0, fence=2) == Settled(returned=2) and outbox.counters()["samples_lost"] == 3
        assert waiting(outbox) == {4: 40, 5: 50}


@pytest.mark.parametrize(("waits", "kept"), [(0, 2), (2, 2), (3, 1), (4, 0), (6, 0)])
def test_receipted_batches_make_room_for_those_that_wait(tmp_path: Path, waits: int, kept: int) -> None:
    with open_outbox(tmp_path, max_bytes=4 * BYTES, keep_share=0.5) as outbox:
        put(outbox, 10, 20, 30)
        hear(outbox, 3)
        put(outbox, *range(waits))
        assert outbox.streams.size(BatchState.KEPT) == (kept, kept * BYTES) and outbox.size() == (
            waits,
            waits * BYTES,
        )
        assert outbox.has_room() == (waits < 4)


# --- the new stream -------------------------------------------------------------------------------------


def test_a_new_stream_is_a_chain_from_its_first_batch_on_under_numbers_of_its_own(outbox: Outbox) -> None:
    put(outbox, 10, 20, rows=3)
    refuse(outbox, 1)
    put(outbox, 30, rows=2)
    part(outbox)
    put(outbox, 40)
    found = batches(outbox)
    assert [one.stream for one in found] == [outbox.stream] * 3
    assert [(one.sequence, one.floor) for one in found] == [(1, 1), (2, 1), (3, 1)]
    assert [one.sample_ids.tolist() for one in found] == [[0, 1, 2], [3, 4], [5]]
    assert [one.previous for one in found] == ["", *(content_digest(one) for one in found[:-1])]
    assert np.unique(decode(found[0].activations)).tolist() == [20.0], "in its own words"


def test_every_batch_names_the_one_before_it_whatever_became_of_that(outbox: Outbox) -> None:
    put(outbox, 10)
    first = receipt_for(outbox, 1).digest
    hear(outbox, 1)
    put(outbox, 20)
    second = receipt_for(outbox, 2).digest
    assert batches(outbox)[0].previous == first
    refuse(outbox, 2)
    put(outbox, 30)
    assert batches(outbox)[0].previous == second


def test_counters_begin_anew_with_the_stream_that_they_are_told_with(outbox: Outbox) -> None:
    taken = Consumed()
    taken.counts["samples_read"] = 5
    outbox.consume(taken)
    outbox.count("bytes_up", 7)
    part(outbox)
    assert outbox.counters() == {"streams_forked": 1}
    outbox.count("bytes_up", 2)
    assert outbox.counters() == {"streams_forked": 1, "bytes_up": 2}


def test_a_move_that_was_cut_short_is_finished_at_the_next_start(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        put(outbox, 10, 20, 30)
        hear(outbox, 1)
        with outbox._file.transaction() as db:
            outbox.streams.begin(db)
    with open_outbox(tmp_path) as outbox:
        assert (
            waiting(outbox) == {1: 20, 2: 30}
            and outbox.size()[0] == 2
            and outbox.streams.current.next_sequence == 3
        )


def test_under_another_devices_name_a_stream_and_samples_of_its_own_begin(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_outbox(tmp_path) as outbox:
        put(outbox, 10)
        stream, name = outbox.stream, outbox.name(b"row")
    with open_outbox(tmp_path, device="pi-2") as outbox:
        assert outbox.stream != stream and waiting(outbox) == {1: 10}
        assert "was device 'pi' until now, and is 'pi-2'" in caplog.text
        assert outbox.counters()["streams_forked"] == 1 and outbox.name(b"row") != name
        assert len({outbox.name(b"row", part) for part in range(3)}) == 3
        stream, name = outbox.stream, outbox.name(b"row")
    with open_outbox(tmp_path, device="pi-2") as outbox:
        assert outbox.stream == stream and outbox.name(b"row") == name


def test_earlier_streams_of_which_anything_was_receipted_are_listed_the_newest_first(outbox: Outbox) -> None:
    names = []
    for receipted in (True, False, True):
        put(outbox, 10)
        names.append(outbox.stream)
        if receipted:
            hear(outbox, 1)
        part(outbox)
    put(outbox, 20)
    hear(outbox, 1)
    assert outbox.streams.earlier() == (names[2], names[0])
    for _ in range(MAX_STREAMS):
        part(outbox)
        put(outbox, 30)
        hear(outbox, 1)
    assert len(outbox.streams.earlier()) == MAX_STREAMS and names[0] not in outbox.streams.earlier()


# --- gaps -----------------------------------------------------------------------------------------------


def test_the_floor_passes_what_was_given_up_and_whatever_waits_is_sent_with_it(outbox: Outbox) -> None:
    put(outbox, 10, 20, 30)
    third = receipt_for(outbox, 3).digest
    assert refuse(outbox, 2) and outbox.streams.floor == 1, "the first still waits"
    hear(outbox, 1)
    assert outbox.streams.floor == 3
    put(outbox, 40)
    assert [one.floor for one in batches(outbox)] == [3, 3]
    assert content_digest(batches(outbox)[0]) == third, "whatever the floor, it is known by the same digest"
    hear(outbox, 4)
    assert outbox.streams.floor == 3, "what was only receipted may be asked for again"


def test_what_waits_is_asked_for_in_pieces(outbox: Outbox) -> None:
    put(outbox, 10, 20, 30, 40)
    refuse(outbox, 2)
    pieces = [[one.sequence for one in outbox.streams.waiting(after, 2)] for after in (0, 1, 3, 4)]
    assert pieces == [[1, 3], [3, 4], [4], []]


def test_what_became_of_a_batch_stands_in_the_file_as_versions_to_come_will_read_it() -> None:
    assert {state.name: state.value for state in BatchState} == {
        "WAITING": 0,
        "KEPT": 1,
        "TRIMMED": 2,
        "GIVEN_UP": 3,
    }


def test_a_refusal_is_believed_of_a_batch_that_waits_under_just_that_content(outbox: Outbox) -> None:
    put(outbox, 10, 20)
    digest = receipt_for(outbox, 1).digest
    assert not outbox.refuse(outbox.stream, 1, OTHER)
    assert not outbox.refuse(outbox.stream, 2, digest) and not outbox.refuse(OTHER, 1, digest)
    assert waiting(outbox) == {1: 10, 2: 20} and outbox.counters()["batches_refused"] == 0
    hear(outbox, 1)
    assert not outbox.refuse(outbox.stream, 1, digest), "it is in the journal"


def test_parts_take_a_batchs_place_at_the_end_unless_it_has_gone(outbox: Outbox) -> None:
    put(outbox, 10, rows=2)
    put(outbox, 20)
    parts = [batches(outbox)[0].select([row]) for row in range(2)]
    outbox.replace(1, parts)
    assert waiting(outbox) == {2: 20, 3: 10, 4: 10} and outbox.streams.floor == 2
    outbox.replace(1, parts)
    assert list(waiting(outbox)) == [2, 3, 4]
