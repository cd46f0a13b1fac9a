"""A batch that comes again is sent as its change, and both ends have the same states, or it is sent whole."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_agent.split_lora.held_states import added_up, written_change
from edge_agent.store.outbox import Consumed
from side_trainer.fold.fold import Fold
from side_trainer.receive.adapter_messages import examine_adapter
from side_trainer.receive.inbox import Refused
from side_trainer.split_lora.tickets import Source
from sidestream.contract.errors import DecodeError
from sidestream.contract.messages import (
    MAX_CHANGES,
    NO_BASE,
    ActivationBatch,
    Receipt,
    Reuse,
    StateChange,
    states_digest,
    unpack_adapter,
)
from sidestream.contract.tensors import Codec, Floats, Tensor, decode, encode
from sidestream.contract.wire import pack, unpack
from tests.agent.tiny import save_tiny
from tests.contract.examples import EXAMPLES
from tests.split.fleet import SplitDevice, SplitFleet, SplitTrainer, config, fleet
from tests.split.test_killed_anywhere import check
from tests.split.test_method import first_batch, reply_in, served

CODECS = {2: Codec.INT2, 4: Codec.INT4, 8: Codec.INT8}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "bert", "bert")


def kinds(made: SplitFleet) -> Counter[str]:
    """How often each kind of record is in the journal; a reuse with a change is one of its own."""
    found: Counter[str] = Counter()
    for record in made.trainer.journal.read(0, limit=1000):
        changed = record.kind == "reuse" and isinstance(reuse_in(record.payload).change, StateChange)
        found["change" if changed else record.kind] += 1
    return found


def reuse_in(payload: bytes) -> Reuse:
    message = unpack_adapter(payload)
    assert isinstance(message, Reuse)
    return message


def run_until(made: SplitFleet, passes: int) -> None:
    """Let everybody take turns until every batch was sent, and answered, so often."""
    (device,) = made.devices
    for _ in range(400):
        made._device_turn(device)
        made._trainer_turn(0.0)
        if not device.batches.flights() and device.batches.done and least(device) >= passes:
            return
    raise AssertionError("it does not come to that")


def least(device: SplitDevice) -> int:
    with device.outbox.reading() as db:
        return int(db.execute("SELECT min(passes) FROM split_batches").fetchone()[0])


def numbers(device: SplitDevice) -> list[int]:
    with device.outbox.reading() as db:
        return [one for (one,) in db.execute("SELECT id FROM split_batches")]


def states_there(made: SplitFleet, ticket: bytes) -> Floats:
    """What the trainer learns from under a ticket."""
    method = made.trainer.method
    found = method.tickets.get(made.devices[0].name, ticket)
    assert found is not None
    return method._batches.take(found.offset, found.source.record, found.source.changes).states


@pytest.mark.parametrize("bits", CODECS)
def test_the_trainer_learns_from_what_the_device_knows_it_to_have(
    tmp_path: Path, backbone: Path, bits: int
) -> None:
    split = {"passes": 5, "change_bits": bits}
    with fleet(tmp_path, config(tmp_path, backbone, split=split, codec=Codec.INT8), {"cut1": 12}) as made:
        (device,) = made.devices
        run_until(made, 3)
        for number in numbers(device):
            batch, held = device.batches.get(number), device.batches.held.of(number)
            assert [one.codec for one in held] == [Codec.INT8, *[CODECS[bits]] * (batch.passes - 1)]
            assert np.array_equal(added_up(held), states_there(made, batch.base))
        made.run()
        found = kinds(made)
        assert found["batch"] == 3 and found["change"] == 12 and found["update"] == 15
        assert device.outbox.counters()["batches_changed"] == 12
        check(made, passes=5, held=True)
        with device.outbox.reading() as db:
            assert not db.execute("SELECT count(*) FROM held_states").fetchone()[0], "nobody needs them now"


def test_what_a_change_loses_is_sent_with_the_next_one(tmp_path: Path, backbone: Path) -> None:
    """Two bits of a change lose a third of it; where nothing moves any more the error falls to nothing."""
    split = {"passes": 8, "change_bits": 2}
    settings = config(tmp_path, backbone, split=split, codec=Codec.INT2, learner={"learning_rate": 1e-12})
    with fleet(tmp_path, settings, {"cut1": 4}) as made:
        (device,), errors = made.devices, []
        for passes in range(1, 8):
            run_until(made, passes)
            (number,) = numbers(device)
            batch = device.batches.get(number)
            exact = device.lower.forward(batch.body.tokens(1)).states
            errors.append(np.linalg.norm(exact - added_up(device.batches.held.of(number))))
        assert all(after < 0.6 * before for before, after in pairwise(errors))


def test_what_hardly_moved_since_it_was_sent_last_stands_not_what_was_sent_first(
    tmp_path: Path, backbone: Path
) -> None:
    split = {"passes": 3, "window": 1, "reuse_below": 0.3}
    with fleet(tmp_path, config(tmp_path, backbone, split=split, codec=Codec.INT8), {"cut1": 4}) as made:
        (device,) = made.devices
        run_until(made, 1)
        device.outbox.append_all([], Consumed(), lambda db: device.batches.stands_for_none(db, 1))
        made.run()
        records = made.trainer.journal.read(0, limit=100)
        *_, last = (unpack(ActivationBatch, one.payload) for one in records if one.kind == "batch")
        (reuse,) = (reuse_in(one.payload) for one in records if one.kind == "reuse")
        assert last.part is not None and last.part.pass_number == 1 and reuse.of == last.part.ticket


def test_a_trainer_that_has_other_states_is_sent_the_whole(tmp_path: Path, backbone: Path) -> None:
    """As where a device was set back, and an earlier life had sent the batch by other adapters."""
    split = {"passes": 3, "window": 2, "change_bits": 2}
    with fleet(tmp_path, config(tmp_path, backbone, split=split, codec=Codec.INT8), {"cut1": 4}) as made:
        batch, (device,) = unpack(ActivationBatch, first_batch(made)), made.devices
        other = encode(decode(batch.activations) + 1.0, Codec.INT8)
        earlier = msgspec.structs.replace(batch, stream="cd" * 16, activations=other)
        made.trainer.take(device.name, device.tier, pack(earlier))
        made.run()
        found = kinds(made)
        assert found["change"] == 2 and found["batch"] == 2 and found["update"] == 3
        check(made, passes=3, held=True)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_device_that_was_set_back_is_served_once_a_pass_all_the_same(
    tmp_path: Path, backbone: Path, passes: int
) -> None:
    """It sends again, by other adapters, what is there: from then on the two know of different states."""
    split = {"passes": 4, "change_bits": 2}
    with fleet(tmp_path, config(tmp_path, backbone, split=split, codec=Codec.INT8), {"cut1": 8}) as made:
        (device,) = made.devices
        run_until(made, passes)
        device.close()
        shutil.copytree(device.folder, tmp_path / "before")
        device.begin()
        run_until(made, passes + 1)
        device.close()
        shutil.rmtree(device.folder)
        shutil.copytree(tmp_path / "before", device.folder)
        device.replies = SimpleQueue()
        device.begin()
        device.outbox.streams.fork()
        made.run()
        found = kinds(made)
        assert found["repeat"] == 2 and found["update"] == 8
        assert found["batch"] == 4, "two in the first pass, and two that the trainer knows otherwise"
        check(made, passes=4, held=True)


def test_a_trainer_that_was_set_back_before_a_batch_is_sent_the_whole(tmp_path: Path, backbone: Path) -> None:
    split = {"passes": 3, "change_bits": 2}
    settings = config(tmp_path, backbone, split=split, codec=Codec.INT8)
    with fleet(tmp_path, settings, {"cut1": 8}) as made:
        (device,) = made.devices
        device.outbox.streams._keep_bytes = 0  # what was receipted is gone
        folder, before = made.trainer.folder, tmp_path / "before"
        shutil.copytree(folder, before)
        run_until(made, 1)
        made.trainer.close()
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        made.trainer = SplitTrainer(settings)
        made.trainer.catch_up()
        behind = Receipt(stream=device.outbox.stream, upto=0, digest="", fence=2)
        assert device.outbox.streams.receipt(behind, ruling=True).returned == 0
        device.receipted = lambda receipt: device.outbox.streams.receipt(receipt, ruling=True)  # type: ignore
        made.run()
        found = kinds(made)
        assert found["batch"] == 2 and found["change"] == 4 and found["serve"] == found["update"] == 4


def test_a_batch_that_is_asked_for_again_is_sent_whole(tmp_path: Path, backbone: Path) -> None:
    """Its change may have come, or not: what the trainer has of it is not known."""
    split = {"passes": 3, "window": 1, "change_bits": 2}
    with fleet(tmp_path, config(tmp_path, backbone, split=split, codec=Codec.INT8), {"cut1": 4}) as made:
        (device,) = made.devices
        run_until(made, 1)
        while not device.waiting():
            device.step()
        (flight,) = device.batches.flights()
        device.exchange._turn_back(flight)
        assert device.batches.get(flight.batch).passes == 1 and not device.batches.held.of(flight.batch)
        made.run()
        check(made, passes=3, held=True)


def test_where_there_is_no_room_to_keep_what_was_sent_the_whole_is_sent(
    tmp_path: Path, backbone: Path
) -> None:
    split = {"passes": 2, "change_bits": 2}
    with fleet(tmp_path, config(tmp_path, backbone, split=split, codec=Codec.INT8), {"cut1": 8}) as made:
        (device,) = made.devices
        device.batches.held._max_bytes = 1500  # one batch of two
        made.run()
        found = kinds(made)
        assert found["batch"] == 3 and found["change"] == 1 and found["update"] == 4


def test_a_change_that_takes_more_bytes_than_the_whole_is_not_sent(tmp_path: Path, backbone: Path) -> None:
    split = {"passes": 2, "change_bits": 8}
    with fleet(tmp_path, config(tmp_path, backbone, split=split, codec=Codec.INT4), {"cut1": 4}) as made:
        made.run()
        assert kinds(made)["batch"] == 2 and not kinds(made)["change"]


def test_a_journal_with_changes_folds_again_from_a_checkpoint(tmp_path: Path, backbone: Path) -> None:
    split = {"passes": 4, "window": 1, "change_bits": 4}
    with fleet(tmp_path, config(tmp_path, backbone, split=split, codec=Codec.INT8), {"cut1": 8}) as made:
        run_until(made, 2)
        made.trainer.checkpoint()
        made.restart_trainer()
        made.run()
        found = kinds(made)
        assert found["batch"] == 2 and found["change"] == 6
        again = Fold(made.trainer.journal)
        for record in made.trainer.journal.read(0, limit=1000):
            again.apply(record)
        assert again.digest() == made.trainer.fold.digest()


# --- what a device may not do ------------------------------------------------------------------------


def changed(made: SplitFleet, of: bytes, change: StateChange, number: int) -> Reuse:
    device = made.devices[0]
    ticket = b"ticket" + number.to_bytes(2, "little")
    batch = unpack(ActivationBatch, device.waiting()[0])
    assert batch.part is not None
    return Reuse(
        stream=device.outbox.stream,
        sequence=number,
        floor=1,
        ticket=ticket,
        of=of,
        split=msgspec.structs.replace(batch.part, ticket=ticket),
        change=change,
    )


@pytest.mark.parametrize("what", ["fits", "of", "base", "rows"])
def test_a_change_of_anything_else_is_refused_and_its_device_is_to_send_the_whole(
    tmp_path: Path, backbone: Path, what: str
) -> None:
    with fleet(tmp_path, config(tmp_path, backbone, codec=Codec.INT8), {"cut1": 4}) as made:
        batch, _ = served(made)
        assert batch.part is not None
        _, vectors, width = batch.activations.shape
        shape = (vectors - (what == "rows"), width)
        base = b"elsewise" if what == "base" else states_digest([batch.activations])
        of = b"no such " if what == "of" else batch.part.ticket
        change = StateChange(base=base, tensor=encode(np.ones(shape), Codec.INT4))
        made.trainer.take(made.devices[0].name, "cut1", pack(changed(made, of, change, 2)))
        made.trainer.serve()
        reply = reply_in(made)
        assert (reply.gradient is None) == (what != "fits")
        assert reply.refused == ("" if what == "fits" else NO_BASE)


def test_a_change_that_is_larger_than_the_states_is_left_out(tmp_path: Path, backbone: Path) -> None:
    """Whole batches are judged by their size."""
    with fleet(tmp_path, config(tmp_path, backbone, codec=Codec.INT8), {"cut1": 4}) as made:
        batch, _ = served(made)
        assert batch.part is not None
        whole = decode(batch.activations)[0]
        for number, share in ((2, 0.9), (3, 1.1)):
            tensor = encode(share * whole, Codec.F32)
            change = StateChange(base=states_digest([batch.activations]), tensor=tensor)
            message = changed(made, batch.part.ticket, change, number)
            made.trainer.take(made.devices[0].name, "cut1", pack(message))
            made.trainer.serve()
            expected = whole * (1.9 if share < 1 else 1.0)
            assert np.allclose(states_there(made, message.ticket), expected, rtol=1e-5)


def test_changes_do_not_go_on_for_ever() -> None:
    """Each costs its trainer the decoding of all before it."""
    tensor = encode(np.ones((1, 3, 8)), Codec.INT8)
    source: Source | None = Source(1, (3, 8), states_digest([tensor]))
    for number in range(MAX_CHANGES + 1):
        assert source is not None and len(source.changes) == number
        change = StateChange(base=source.digest, tensor=encode(np.ones((3, 8)), Codec.INT2))
        source = source.changed(2 + number, change)
    assert source is None


@pytest.mark.parametrize(
    ("why", "tensor"),
    [
        ("width", encode(np.ones((3, 8)), Codec.INT8)),
        ("moves so far", encode(np.full((3, 32), 1e7), Codec.F32)),
        (
            "NaN or infinite",
            Tensor(codec=Codec.F32, shape=(1, 32), data=np.full(32, np.nan, "<f4").tobytes()),
        ),
    ],
)
def test_a_change_that_no_backbone_makes_is_not_journaled(
    tmp_path: Path, backbone: Path, why: str, tensor: Tensor
) -> None:
    with fleet(tmp_path, config(tmp_path, backbone), {"cut1": 4}) as made:
        first_batch(made)
        message = changed(made, b"ticket 1", StateChange(base=b"12345678", tensor=tensor), 2)
        with pytest.raises(Refused, match=why):
            examine_adapter(pack(message), "cut1", made.trainer.plan)


@pytest.mark.parametrize(
    "tensor",
    [
        encode(np.ones((1, 3, 8)), Codec.INT8),
        Tensor(codec=Codec.PQ1, shape=(3, 8), data=bytes(3), codebooks=bytes(16)),
    ],
)
def test_a_change_is_of_vectors_and_has_no_codebooks(tensor: Tensor) -> None:
    with pytest.raises(DecodeError, match="a change"):
        StateChange(base=b"12345678", tensor=tensor)


# --- how it is written -------------------------------------------------------------------------------


def test_states_have_the_same_digest_in_every_version() -> None:
    """Devices and trainers of different versions would send every batch whole."""
    message = EXAMPLES["reuse with a change"]
    assert isinstance(message, Reuse) and isinstance(message.change, StateChange)
    assert states_digest([message.change.tensor], b"12345678").hex() == "b516e32d2d4f5e1f"


@given(st.lists(st.sampled_from(list(CODECS.values())), min_size=1, max_size=4))
def test_a_digest_is_of_all_that_was_sent_in_its_order(codecs: list[Codec]) -> None:
    parts = [encode(np.full((2, 8), 1.0 + number), codec) for number, codec in enumerate(codecs)]
    digest = b""
    for one in parts:
        digest = states_digest([one], digest)
    assert digest == states_digest(parts)
    if len(parts) > 1:
        assert digest != states_digest(parts[::-1]) and digest != states_digest(parts[:-1])


@given(
    arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(1, 90)), elements=st.floats(-1e5, 1e5, width=32)
    )
)
def test_two_bits_of_a_change_never_lose_all_of_it(change: Floats) -> None:
    """So that what is sent again and again comes closer; within what a block's largest value allows."""
    lost = change - decode(written_change(change, Codec.INT2))
    assert np.linalg.norm(lost) <= np.linalg.norm(change) * 1.01 + 1e-30


def test_two_bits_lose_a_third_of_normal_values() -> None:
    change = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    lost = [
        np.linalg.norm(change - decode(one))
        for one in (written_change(change, Codec.INT2), encode(change, Codec.INT2))
    ]
    assert lost[0] < 0.36 * np.linalg.norm(change) < lost[1]
