"""What one device sends or loses does no harm to others, and leaves no device waiting for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.split_lora.prepared import Preparer, StoredBody
from edge_agent.split_lora.stored_batches import StoredBatches
from edge_agent.store.outbox import Consumed, Outbox
from side_trainer.split_lora.local import Upload, too_far
from sidestream.backbone.runtimes import shared_backbone
from sidestream.contract.messages import (
    ActivationBatch,
    AdapterGradient,
    GradientReply,
    content_digest,
    to_bin,
    unpack_adapter,
)
from sidestream.contract.plan import Plan, RoundPlan, TierPlan
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec, encode
from sidestream.contract.wire import pack, unpack
from sidestream.split_model.adapter_bundle import decode_adapters, encode_adapters
from tests.agent.tiny import save_tiny
from tests.split.fleet import JOB, LABELS, SplitFleet, config, fleet
from tests.split.test_method import first_batch, reply_in

LOCAL = {"adapters": "local", "round": RoundPlan(batches=2)}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "bert", "bert")


# --- uploads -------------------------------------------------------------------------------------------


def uploads(moves: dict[str, float]) -> tuple[list[Upload], dict[str, Any]]:
    """Of devices that moved every value so far."""
    lots = np.random.default_rng(3)
    common = {"a": lots.normal(0, 0.05, (8, 32)).astype(np.float32), "b": np.zeros((32, 8), np.float32)}
    return [
        Upload(
            offset=number,
            device=name,
            samples=8,
            tensors={one: (array + np.float32(move)).astype(np.float32) for one, array in common.items()},
        )
        for number, (name, move) in enumerate(moves.items())
    ], common


@pytest.mark.parametrize(
    ("moves", "refused"),
    [
        ({"one": 0.004, "two": 0.006, "three": 0.008}, set()),
        ({"one": 0.0001, "two": 0.0001, "three": 0.008}, set()),  # it made all steps, the others next to none
        ({"one": 0.004, "two": 0.006, "three": 1e30}, {"three"}),
        ({"one": 0.004, "two": 0.006, "three": 0.2}, {"three"}),
        ({"one": 0.004, "two": 1e4}, {"two"}),
        ({"one": 1e4}, {"one"}),
        ({"one": 0.008}, set()),
        ({"one": 1e30, "two": 1e30, "three": 0.004}, {"one", "two"}),
    ],
)
def test_an_upload_that_no_steps_lead_to_is_not_averaged(moves: dict[str, float], refused: set[str]) -> None:
    found, common = uploads(moves)
    why = too_far(found, common, RoundPlan(batches=8, learning_rate=1e-3), 0.0)
    assert why.keys() == refused and all("is the most" in one for one in why.values())


def test_an_absurd_upload_moves_nothing_and_the_round_ends(tmp_path: Path, backbone: Path) -> None:
    settings = config(tmp_path, backbone, split=LOCAL)
    with fleet(tmp_path, settings, {"cut1": 16, "cut1/more": 16}) as made:
        liar: Any = made.devices[1].adapters
        honest = liar._writer.upload

        def absurd(name: bytes, number: int, samples: int, steps: int, tensors: Any) -> Any:
            return honest(
                name, number, samples, steps, {one: 1e4 + 0 * array for one, array in tensors.items()}
            )

        liar._writer.upload = absurd
        made.run(now=iter(range(0, 10**7, 50)).__next__)
        assert made.trainer.method.rounds >= 2
        largest = max(float(np.abs(one).max()) for one in made.trainer.method.weights().values())
        assert largest < 5


# --- waiting -------------------------------------------------------------------------------------------


def test_a_device_takes_part_again_after_its_trainer_was_set_back_by_rounds(
    tmp_path: Path, backbone: Path
) -> None:
    with fleet(tmp_path, config(tmp_path, backbone, split=LOCAL), {"cut1": 32}) as made:
        (device,) = made.devices
        version, before = made.trainer.bundle("cut1")
        made.run()
        assert device.adapters.round >= 2
        assert not device.adapters.may_send(0) or device.adapters.ready()
        bundle = decode_adapters(before)
        about = msgspec.structs.replace(bundle.about, round=1, version=version + 1000)
        device.adopt(version + 1000, encode_adapters(about, bundle.tensors, codec="f32"))
        assert device.adapters.ready() and device.adapters.round == 1
        assert device.adapters.may_send(0)
        device.again()
        device.adopt(version + 1000, encode_adapters(about, bundle.tensors, codec="f32"))
        assert device.adapters.ready() and device.adapters.may_send(0)


def answered(made: SplitFleet) -> AdapterGradient:
    """Run one device until what it made of its first answer is in its outbox."""
    payload, (device,) = first_batch(made), made.devices
    receipt = made.trainer.take(device.name, device.tier, payload)
    assert receipt is not None
    device.receipted(receipt)
    made.trainer.serve()
    made._deliver_retained(device)
    device.step()
    (sent,) = device.waiting()
    found = unpack_adapter(sent)
    assert isinstance(found, AdapterGradient)
    device.step()
    assert len(device.waiting()) == 1, "in step with the trainer, it waits"
    return found


def sends_another(made: SplitFleet) -> bool:
    (device,) = made.devices
    before = device.batches.done
    device.step()
    return device.batches.done > before


def test_in_step_a_device_goes_on_when_its_gradient_will_never_be_learnt(
    tmp_path: Path, backbone: Path
) -> None:
    for number, lost in enumerate(("refused by the inbox", "refused by the fold", "ten minutes")):
        folder = tmp_path / str(number)
        folder.mkdir()
        with fleet(folder, config(folder, backbone), {"cut1": 12}) as made:
            (device,), found = made.devices, answered(made)
            assert not sends_another(made)
            if lost == "refused by the inbox":
                digest = content_digest(found)
                assert device.outbox.refuse(found.stream, found.sequence, digest)
            elif lost == "refused by the fold":
                reply = GradientReply(run=device.plan.run, ticket=found.ticket, applied=10**6, refused="late")
                device.hear(pack(reply))
                device.step()
            else:
                adapters: Any = device.adapters
                adapters._clock = lambda since_s=adapters._since_s: since_s + 601
            assert sends_another(made) or device.batches.done == 2, lost


def test_in_step_every_gradient_gets_a_version_even_one_that_moves_nothing(
    tmp_path: Path, backbone: Path
) -> None:
    with fleet(tmp_path, config(tmp_path, backbone, learner={"weight_decay": 0.0}), {"cut1": 4}) as made:
        found, method = answered(made), made.trainer.method
        before = method.weights()
        made.trainer.bundle("cut1")
        assert method.moved_by(before, method.weights()) == 0
        zeros = {
            name: encode(np.zeros(one.shape, np.float32), Codec.F32) for name, one in found.tensors.items()
        }
        (device,) = made.devices
        made.trainer.take(device.name, device.tier, pack(msgspec.structs.replace(found, tensors=zeros)))
        made.trainer.catch_up()
        assert method.moved_by(before, method.weights()) == float("inf")
        made.trainer.bundle("cut1")
        assert method.moved_by(before, method.weights()) == 0


# --- reuse ---------------------------------------------------------------------------------------


def test_rows_that_had_all_come_before_are_learnt_from_in_later_passes(
    tmp_path: Path, backbone: Path
) -> None:
    """As where a device begins anew with a copy of an outbox: its first pass counts already."""
    split = {"passes": 3, "reuse_below": 0.9, "window": 2}
    with fleet(tmp_path, config(tmp_path, backbone, split=split), {"cut1": 4}) as made:
        batch, (device,) = unpack(ActivationBatch, first_batch(made)), made.devices
        assert batch.part is not None
        another = msgspec.structs.replace(batch.part, ticket=b"another1")
        made.trainer.take(
            device.name, device.tier, pack(msgspec.structs.replace(batch, stream="cd" * 16, split=another))
        )
        made.run()
        records = made.trainer.journal.read(0, limit=1000)
        sent = [unpack(ActivationBatch, one.payload).part for one in records if one.kind == "batch"]
        assert [one.pass_number for one in sent if one is not None] == [0, 1]  # whole, once more
        reused = [unpack_adapter(one.payload) for one in records if one.kind == "reuse"]
        assert len(reused) == 2, "of the second pass in vain, of the third"
        updates = [one for one in records if one.kind == "update"]
        assert len(updates) == 2, "both later passes were answered, and learnt"


def test_a_batch_under_a_ticket_that_is_known_is_answered_whatever_it_holds(
    tmp_path: Path, backbone: Path
) -> None:
    """As where one life sends it as a reuse, and a later one, that was set back before it, whole."""
    with fleet(tmp_path, config(tmp_path, backbone, split={"window": 2}), {"cut1": 4}) as made:
        batch, (device,) = unpack(ActivationBatch, first_batch(made)), made.devices
        assert batch.part is not None
        made.trainer.take(device.name, device.tier, pack(batch))
        made.trainer.serve()
        later = msgspec.structs.replace(
            batch,
            stream="cd" * 16,
            keys=bytes(reversed(batch.keys)),
            split=msgspec.structs.replace(batch.part, slot=1),
        )
        made.trainer.take(device.name, device.tier, pack(later))
        made.trainer.serve()
        assert reply_in(made, 1).refused == "it had come before"


# --- rows that are too long ------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Task.TEXT_CLASSIFICATION, Task.CAUSAL_LM])
def test_batches_that_are_kept_are_cut_where_the_plan_takes_less_than_before(
    tmp_path: Path, backbone: Path, task: Task
) -> None:
    generates = task is Task.CAUSAL_LM
    tier = TierPlan(
        backbone="", sampling="all", max_tokens=5, depth=1, width=32, taps=(1,), vocabulary=300 * generates
    )
    plan = Plan(job=JOB, run="ab" * 16, revision=1, task=task, labels=LABELS, tiers={"cut1": tier})
    preparer = Preparer(shared_backbone(str(backbone), 1), plan, "cut1")
    end = preparer._input.tokenizer.all_special_ids[0]
    rows = ((19, 18, 17, 16, 15, 14, end), (19, 18, end), (11, 12, 13, 14, 15, 16, 17))
    targets = to_bin(range(17), "<u2") if generates else b"\0\0\1\0\1\0"
    context = (6, 0, 2) if generates else ()
    body = StoredBody(ids=rows, segments=rows, targets=targets, context=context, names=(b"1" * 8,) * 3)
    cut = preparer.shortened(body)
    first = (19, 18, 17, 16, 15 if generates else end)
    assert cut.ids == (first, (19, 18, end), (11, 12, 13, 14, 15)) == cut.segments
    wanted = to_bin([0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13, 14], "<u2")
    assert cut.targets == (wanted if generates else targets) and cut.context == (
        (5, 0, 2) if generates else ()
    )
    assert preparer.shortened(cut) is cut
    with Outbox(tmp_path, job=JOB, device="d", tier="cut1", max_bytes=2**20) as outbox:
        batches = StoredBatches(outbox, 2)
        outbox.append_all([], Consumed(), lambda db: batches.add(db, body))
        assert batches.rewrite(preparer.shortened) == 1
        assert batches.rewrite(preparer.shortened) == 0
        found = batches.next()
        assert found is not None and found.body == cut and not found.base and not found.sketch


def test_a_row_that_is_longer_than_the_model_sees_stops_no_trainer(tmp_path: Path, backbone: Path) -> None:
    """Where max_tokens allows it. Its device is answered without a gradient, and nothing moves."""
    settings = config(tmp_path, backbone)
    tier = msgspec.structs.replace(settings.tiers["cut1"], max_tokens=4096)
    with fleet(tmp_path, msgspec.structs.replace(settings, tiers={"cut1": tier}), {"cut1": 4}) as made:
        batch, (device,) = unpack(ActivationBatch, first_batch(made)), made.devices
        longest = made.trainer.method.model.view.text_input.longest
        assert batch.part is not None and longest < 4000
        states = np.ones((1, longest + 1, batch.activations.shape[2]), np.float32)
        long = msgspec.structs.replace(
            batch,
            samples=to_bin([0], "<u4"),
            lengths=to_bin([longest + 1], "<u2"),
            targets=b"\0\0",
            keys=batch.keys[:8],
            activations=encode(states, Codec.INT8),
            split=msgspec.structs.replace(batch.part, rows=1),
        )
        before = made.trainer.method.weights()
        made.trainer.take(device.name, device.tier, pack(long))
        assert made.trainer.serve()
        assert reply_in(made).refused and reply_in(made).gradient is None
        after = made.trainer.method.weights()
        assert all((after[name] == array).all() for name, array in before.items())
