"""What a split method does with what devices send, and what it does not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from side_trainer.fold.fold import Fold
from side_trainer.journal.records import RecordKind
from side_trainer.receive.adapter_messages import examine_adapter
from side_trainer.receive.inbox import Refused, examine
from side_trainer.split_lora.frozen import SplitFrozenMethod
from side_trainer.split_lora.rounds import Rounds
from sidestream.contract.messages import (
    ActivationBatch,
    AdapterGradient,
    GradientReply,
    Reuse,
    unpack_adapter,
)
from sidestream.contract.plan import RoundPlan
from sidestream.contract.tensors import Codec, encode
from sidestream.contract.wire import pack, unpack
from sidestream.split_model.adapter_bundle import decode_adapters
from tests.agent.tiny import save_tiny
from tests.split.fleet import TOPICS, SplitFleet, config, fleet
from tests.split.frozen import frozen_job


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "bert", "bert")


def first_batch(made: SplitFleet) -> bytes:
    """What the first device sends first."""
    (device, *_) = made.devices
    while not device.waiting():
        device.step()
    return device.waiting()[0]


def reply_in(made: SplitFleet, slot: int = 0) -> GradientReply:
    device = made.devices[0]
    return unpack(GradientReply, made.trainer.link.retained[TOPICS.gradient(device.tier, device.name, slot)])


def served(made: SplitFleet) -> tuple[ActivationBatch, GradientReply]:
    """The first batch, and the answer to it."""
    payload, device = first_batch(made), made.devices[0]
    made.trainer.take(device.name, device.tier, payload)
    made.trainer.serve()
    return unpack(ActivationBatch, payload), reply_in(made)


def gradient(made: SplitFleet, ticket: bytes, **changes: object) -> AdapterGradient:
    """Of ones, for the device's adapters."""
    device = made.devices[0]
    shapes = {name: array.shape for name, array in device.lower.arrays().items()}
    fields = {
        "stream": device.outbox.stream,
        "sequence": 2,
        "floor": 1,
        "ticket": ticket,
        "adapter": 1,
        "samples": 4,
        "tensors": {name: encode(np.ones(shape), Codec.F32) for name, shape in shapes.items()},
        **changes,
    }
    return AdapterGradient(**fields)  # type: ignore[arg-type]


def take(made: SplitFleet, message: AdapterGradient) -> None:
    device = made.devices[0]
    made.trainer.take(device.name, device.tier, pack(message))
    made.trainer.serve()


def test_an_answer_has_a_gradient_for_every_vector_and_its_note_takes_its_place(
    tmp_path: Path, backbone: Path
) -> None:
    with fleet(tmp_path, config(tmp_path, backbone), {"cut1": 8}) as made:
        batch, reply = served(made)
        assert reply.gradient is not None and batch.part is not None and reply.ticket == batch.part.ticket
        assert reply.gradient.shape == batch.activations.shape[1:] and not reply.applied
        before = made.trainer.method.weights()
        take(made, gradient(made, reply.ticket))
        note, after = reply_in(made), made.trainer.method.weights()
        assert note.gradient is None and note.applied == made.trainer.fold.offset and not note.refused
        moved = {name for name in before if not np.array_equal(before[name], after[name])}
        assert moved == set(made.devices[0].lower.names)


@pytest.mark.parametrize(
    ("why", "changes"),
    [
        ("not those of the adapters", {"tensors": {"else": encode(np.ones((2, 2)), Codec.F32)}}),
        ("batches late", {}),
    ],
)
def test_a_gradient_that_does_not_fit_or_is_late_moves_nothing_and_its_device_is_told(
    tmp_path: Path, backbone: Path, why: str, changes: dict[str, object]
) -> None:
    late = "late" in why
    settings = config(tmp_path, backbone, learner={"staleness": 0}, split={"window": 2})
    with fleet(tmp_path, settings, {"cut1": 8}) as made:
        _, reply = served(made)
        if late:
            device = made.devices[0]
            device.step()
            made.trainer.take(device.name, device.tier, device.waiting()[-1])
            made.trainer.serve()
        before = made.trainer.method.weights()
        take(made, gradient(made, reply.ticket, sequence=3 if late else 2, **changes))
        after = made.trainer.method.weights()
        assert why in reply_in(made).refused
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_gradients_are_not_taken_by_another_method_nor_slots_outside_the_window(
    tmp_path: Path, backbone: Path
) -> None:
    with fleet(tmp_path, config(tmp_path, backbone), {"cut1": 8}) as made:
        batch = unpack(ActivationBatch, first_batch(made))
        assert batch.part is not None
        outside = msgspec.structs.replace(batch, split=msgspec.structs.replace(batch.part, slot=1))
        with pytest.raises(Refused, match="window of 1"):
            examine(pack(outside), "cut1", made.trainer.plan)
        bare = msgspec.structs.replace(batch, split=msgspec.UNSET)
        with pytest.raises(Refused, match="another method"):
            examine(pack(bare), "cut1", made.trainer.plan)
        with pytest.raises(Refused, match="tier"):
            examine_adapter(pack(gradient(made, b"12345678")), "other", made.trainer.plan)
        with pytest.raises(Refused, match="not an Adapter"):
            examine_adapter(pack(batch), "cut1", made.trainer.plan)


def test_what_hardly_moved_is_not_sent_again_and_is_learnt_from_all_the_same(
    tmp_path: Path, backbone: Path
) -> None:
    settings = config(
        tmp_path, backbone, split={"passes": 3, "reuse_below": 0.9, "window": 2}, codec=Codec.INT8
    )
    with fleet(tmp_path, settings, {"cut1": 20}) as made:
        made.run()
        kinds = [record.kind for record in made.trainer.journal.read(0, limit=1000)]
        assert kinds.count("batch") == 5 and kinds.count("reuse") == 10 and kinds.count("update") == 15
        assert made.trainer.method.samples == 20
        assert made.devices[0].outbox.counters()["batches_reused"] == 10


def test_nobody_gets_the_gradient_of_anothers_batch(tmp_path: Path, backbone: Path) -> None:
    """A reuse names a batch of the same device; under a neighbour's ticket there is none."""
    with fleet(tmp_path, config(tmp_path, backbone, cuts=(1,)), {"cut1": 8, "cut1/b": 8}) as made:
        batch, _ = served(made)
        assert batch.part is not None
        thief = made.devices[1]
        part = msgspec.structs.replace(batch.part, ticket=b"thief 01")
        message = Reuse(
            stream=thief.outbox.stream,
            sequence=1,
            floor=1,
            ticket=b"thief 01",
            of=batch.part.ticket,
            split=part,
        )
        made.trainer.take(thief.name, thief.tier, pack(message))
        made.trainer.serve()
        told = unpack(GradientReply, made.trainer.link.retained[TOPICS.gradient("cut1", thief.name, 0)])
        assert told.gradient is None and "not here" in told.refused


def test_a_round_waits_for_who_takes_part_until_the_deadline_and_a_quorum(
    tmp_path: Path, backbone: Path
) -> None:
    plan = RoundPlan(batches=1, devices=1, quorum=0.5, deadline_s=10.0)
    settings = config(tmp_path, backbone, split={"adapters": "local", "round": plan})
    with fleet(tmp_path, settings, {"cut1": 8, "cut1/b": 8}) as made:
        one, two = made.devices
        for device in (one, two):
            while not device.waiting():
                device.step()
            made.trainer.take(device.name, device.tier, device.waiting()[0])
        made.trainer.serve()
        made.trainer.serve()
        one.hear(made.trainer.link.retained[TOPICS.gradient("cut1", one.name, 0)])
        while len(one.waiting()) < 2:
            one.step()
        upload = one.waiting()[-1]
        made.trainer.take(one.name, one.tier, upload)
        made.trainer.catch_up()
        rounds: Rounds = made.trainer.method.averaging
        assert rounds.due(100.0) is None, "the other one takes part"
        assert rounds.due(109.0) is None
        ended = rounds.due(111.0)
        assert ended is not None and ended.number == 0
        assert made.trainer.serve(112.0) is False or made.trainer.method.rounds in (0, 1)
        made.trainer.serve(200.0)
        assert made.trainer.method.rounds == 1
        late = msgspec.structs.replace(unpack_adapter(upload), sequence=9, ticket=b"late one")
        made.trainer.take(two.name, two.tier, pack(msgspec.structs.replace(late, stream=two.outbox.stream)))
        made.trainer.catch_up()
        assert rounds.due(300.0) is None, "what is of an earlier round is of no use"


def test_frozen_devices_are_sent_nothing_before_the_end_and_their_journal_folds_again(
    tmp_path: Path, backbone: Path
) -> None:
    settings = config(tmp_path, backbone, method="split-frozen", learner={"passes": 2.0})
    with frozen_job(tmp_path, settings, rows=20) as (journal, fold):
        method = fold.method
        assert isinstance(method, SplitFrozenMethod)
        assert not method.has_weights and method.owed(2.0) == 10
        while (owed := method.owed(2.0)) > 0:
            idle = method.next_idle(2.0, 8, fold.offset)
            assert 0 < idle.rows <= owed
            offset = journal.append(RecordKind.IDLE.value, msgspec.json.encode(idle))
            fold.apply(journal.get(offset))
        assert method.has_weights and method.updates == 15
        bundle = decode_adapters(method.bundles(journal.run, 1, "f32", final=True)["cut1"])
        layers = {method.model.layer_of(name) for name in bundle.tensors}
        assert layers == {None, 1, 2, 3}, "a device's own layers stay as they are"
        again = Fold(journal)
        for record in journal.read(0, limit=1000):
            again.apply(record)
        assert again.digest() == fold.digest()
