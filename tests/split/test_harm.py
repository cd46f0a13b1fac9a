"""What one device sends or loses does no harm to others, and leaves no device waiting for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from side_trainer.split_lora.local import Upload, too_far
from sidestream.contract.messages import (
    AdapterGradient,
    GradientReply,
    content_digest,
    unpack_adapter,
)
from sidestream.contract.plan import RoundPlan
from sidestream.contract.tensors import Codec, encode
from sidestream.contract.wire import pack
from sidestream.split_model.adapter_bundle import decode_adapters, encode_adapters
from tests.agent.tiny import save_tiny
from tests.split.fleet import SplitFleet, config, fleet
from tests.split.test_method import first_batch

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
