from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import edge_agent
from broker_config.testing.inprocess import InProcessBroker
from edge_agent.weights.adopted import load_adopted
from edge_agent.weights.chunks import MAX_BUNDLE_BYTES, Assembly
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import load_backbone
from sidestream.contract.errors import BackboneError, DecodeError, MismatchError, StateError
from sidestream.contract.messages import WeightsChunk
from sidestream.contract.plan import SideNetworkSpec
from sidestream.side_network.bundle import decode_bundle, digest, encode_bundle
from sidestream.side_network.form import first_blocks
from tests.agent.fake_trainer import RUN, SPEC, TIER, FakeTrainer
from tests.agent.fleet import Running
from tests.agent.tiny import save_tiny
from tests.until import until

pytestmark = pytest.mark.slow


def version_of(folder: Path) -> int:
    kept = load_adopted(folder)
    return kept.adopted.version if kept is not None else 0


def wait_for(trainer: FakeTrainer, version: int) -> None:
    trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == version)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state-pi-1"


def test_retained_weights_are_adopted_at_once_and_predict_offline(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path, state: Path
) -> None:
    trainer.publish_plan()
    trainer.publish_weights(7, favour=1, final=True)
    with Running(broker, bert, tmp_path):
        wait_for(trainer, 7)
    broker.stop()
    predictor = edge_agent.load(state)
    answers = predictor.predict(["turn the lights on", "", "off " * 100])
    assert predictor.version == 7 and [answer.label for answer in answers] == ["on"] * 3
    assert all(0.5 < answer.probability <= 1 for answer in answers)
    assert predictor.predict([]) == []
    for wrong in ("turn the lights on", [5]):
        with pytest.raises(TypeError, match="list of texts"):
            predictor.predict(wrong)


def test_only_newer_versions_of_the_run_are_adopted(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path, state: Path
) -> None:
    trainer.publish_plan()
    with Running(broker, bert, tmp_path):
        trainer.publish_weights(5, favour=1, final=True)
        wait_for(trainer, 5)
        trainer.publish_weights(4, final=True)
        trainer.publish_weights(5, final=True)
        bundle = trainer.bundle(9, run="ee" * 16)
        trainer.send(trainer.topics.weights(TIER), trainer.manifest(9, bundle, run="ee" * 16))
        trainer.wait_for_telemetry("pi-1", 3)
        assert version_of(state) == 5 and edge_agent.load(state).predict(["on"])[0].label == "on"
        trainer.publish_weights(6, final=True)
        wait_for(trainer, 6)
    assert len(list((state / "weights").glob("*.safetensors"))) == 1


def test_of_several_waiting_versions_the_newest_is_adopted(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    for version in range(1, 30):
        trainer.publish_weights(version)
    with Running(broker, bert, tmp_path):
        wait_for(trainer, 29)


def test_a_bundle_in_chunks_is_put_together_and_its_leftovers_forgotten(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    trainer.publish_weights(2, chunks=3)
    with Running(broker, bert, tmp_path):
        wait_for(trainer, 2)
        trainer.publish_weights(3, chunks=5, favour=1)
        trainer.publish_weights(4, chunks=4, favour=1, final=True)
        wait_for(trainer, 4)
        trainer.publish_weights(5, final=True)
        wait_for(trainer, 5)


def test_weights_that_came_before_the_plan_are_adopted_after_it(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    with Running(broker, bert, tmp_path):
        trainer.publish_weights(3, chunks=2)
        trainer.wait_for_telemetry("pi-1", 3)
        trainer.publish_plan()
        wait_for(trainer, 3)


def test_a_forged_version_from_the_future_does_not_stop_adoption(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    with Running(broker, bert, tmp_path):
        for forged in (
            trainer.manifest(10**9, b"rubbish"),
            trainer.manifest(10**9, b"rubbish", chunks=3),
        ):
            trainer.send(trainer.topics.weights(TIER), forged)
            trainer.wait_for_telemetry("pi-1", 3)
        trainer.publish_weights(2)
        wait_for(trainer, 2)
        trainer.publish_weights(3, final=True)
        wait_for(trainer, 3)


def test_a_restarted_agent_goes_on_with_what_it_had(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    trainer.publish_weights(3)
    with Running(broker, bert, tmp_path):
        wait_for(trainer, 3)
    trainer.send(trainer.topics.weights(TIER), b"")
    trainer.telemetry.clear()
    with Running(broker, bert, tmp_path):
        wait_for(trainer, 3)


def test_a_bundle_of_the_blocks_that_the_tier_needs_is_enough(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    tiers = {TIER: msgspec.structs.replace(trainer.plan.tiers[TIER], taps=(2,))}
    trainer.publish_plan(tiers=tiers)
    with Running(broker, bert, tmp_path):
        bundle = decode_bundle(trainer.bundle(3, favour=1))
        about = msgspec.structs.replace(bundle.about, side_network=msgspec.structs.replace(SPEC, blocks=1))
        data = encode_bundle(about, first_blocks(bundle.tensors, 1), codec="int8")
        trainer.send(trainer.topics.weights(TIER), trainer.manifest(3, data, final=True))
        wait_for(trainer, 3)
    assert edge_agent.load(tmp_path / "state-pi-1").predict(["on"])[0].label == "on"


def _too_few_blocks(trainer: FakeTrainer) -> bytes:
    bundle = decode_bundle(trainer.bundle(6))
    about = msgspec.structs.replace(bundle.about, side_network=msgspec.structs.replace(SPEC, blocks=1))
    return encode_bundle(about, first_blocks(bundle.tensors, 1))


def _garbage(trainer: FakeTrainer) -> bytes:
    return b"\x10\0\0\0\0\0\0\0 no safetensors at all"


def _not_a_number(trainer: FakeTrainer) -> bytes:
    bundle = decode_bundle(trainer.bundle(6))
    bundle.tensors["steps.0.head.bias"][0] = float("nan")
    return encode_bundle(bundle.about, bundle.tensors)


def _one_tensor_short(trainer: FakeTrainer) -> bytes:
    bundle = decode_bundle(trainer.bundle(6))
    return encode_bundle(bundle.about, {n: t for n, t in bundle.tensors.items() if n != "steps.0.head.bias"})


HOSTILE: dict[str, Callable[[FakeTrainer], bytes]] = {
    "garbage": _garbage,
    "not a number": _not_a_number,
    "a tensor short": _one_tensor_short,
    "fewer blocks than taps": _too_few_blocks,
    "another version": lambda t: t.bundle(7),
    "another run": lambda t: t.bundle(6, run="ee" * 16),
    "another job": lambda t: t.bundle(6, job="heating"),
    "other labels": lambda t: t.bundle(6, labels=("on", "off")),
    "another shape": lambda t: t.bundle(6, side_network=SideNetworkSpec(blocks=2, width=16, inner=8)),
    "no such tier": lambda t: t.bundle(6, tiers={}),
    "another width": lambda t: t.bundle(6, aligns={"default": 64}),
    "huge on paper": lambda t: t.bundle(6, side_network=SideNetworkSpec(blocks=256, width=8192, inner=32768)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_bundles_are_refused_and_the_old_one_stays(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    state: Path,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer.publish_plan()
    trainer.publish_weights(5, favour=1)
    with Running(broker, bert, tmp_path):
        wait_for(trainer, 5)
        bundle = HOSTILE[kind](trainer)
        trainer.send(trainer.topics.weights(TIER), trainer.manifest(6, bundle, final=True))
        until(lambda: "weights version 6 refused" in caplog.text)
        assert version_of(state) == 5
        trainer.publish_weights(8, favour=1, final=True)
        wait_for(trainer, 8)


@pytest.mark.slow
def test_a_bundle_that_is_not_the_announced_one_is_refused(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer.publish_plan()
    with Running(broker, bert, tmp_path):
        manifest = trainer.manifest(1, trainer.bundle(1), bundle_digest="0" * 64)
        trainer.send(trainer.topics.weights(TIER), manifest)
        until(lambda: "not the one that the manifest announces" in caplog.text)


# --- chunks ----------------------------------------------------------------------------------------------


def manifest(trainer: FakeTrainer, **changes: Any) -> Any:
    return trainer.manifest(3, b"x" * 10, **{"chunks": 3, **changes})


def test_chunks_make_a_whole_in_any_order_and_strangers_do_not_count(trainer: FakeTrainer) -> None:
    assembly = Assembly(manifest(trainer))
    chunk = WeightsChunk(run=RUN, version=3, index=2, data=b"789")
    assert assembly.add(chunk) is None and assembly.add(chunk) is None
    for stranger in ({"version": 2, "index": 0}, {"run": "ee" * 16, "index": 0}, {"index": 9}):
        assert assembly.add(msgspec.structs.replace(chunk, **stranger)) is None
    assert assembly.add(msgspec.structs.replace(chunk, index=0, data=b"123")) is None
    assert assembly.add(msgspec.structs.replace(chunk, index=1, data=b"456")) == b"123456789"


def test_chunks_hold_no_more_than_was_announced(trainer: FakeTrainer) -> None:
    assembly = Assembly(manifest(trainer))
    with pytest.raises(DecodeError, match="more than was announced"):
        assembly.add(WeightsChunk(run=RUN, version=3, index=0, data=b"x" * 11))
    with pytest.raises(MismatchError, match="a device takes"):
        Assembly(manifest(trainer, bundle_bytes=MAX_BUNDLE_BYTES + 1))


# --- predict ---------------------------------------------------------------------------------------------


def test_nothing_adopted_yet_is_said(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no weights have been adopted yet"):
        edge_agent.load(tmp_path)
    with pytest.raises(StateError, match="no such state directory"):
        edge_agent.load(tmp_path / "nowhere")


@pytest.fixture
def adopted(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path, state: Path
) -> Path:
    trainer.publish_plan()
    trainer.publish_weights(7)
    with Running(broker, bert, tmp_path):
        wait_for(trainer, 7)
    return state


def test_a_damaged_bundle_is_noticed_and_adopted_anew(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path, adopted: Path
) -> None:
    bundle = next((adopted / "weights").glob("*.safetensors"))
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StateError, match="damaged"):
        edge_agent.load(adopted)
    trainer.telemetry.clear()
    with Running(broker, bert, tmp_path):
        wait_for(trainer, 7)
    assert digest(bundle.read_bytes()) == digest(whole)
    bundle.unlink()
    with pytest.raises(StateError, match="bundle is missing"):
        edge_agent.load(adopted)
    (adopted / "weights" / "adopted.json").write_text("{")
    with pytest.raises(StateError, match=r"adopted\.json: cannot be read"):
        edge_agent.load(adopted)


def test_a_backbone_that_has_moved_is_named_and_another_one_refused(
    adopted: Path, bert: Backbone, tmp_path: Path
) -> None:
    moved = load_backbone(bert.name)
    assert edge_agent.load(adopted, backbone=moved.name).predict(["on"])
    other = save_tiny(tmp_path / "other", "bert", seed=5)
    with pytest.raises(BackboneError, match="install the same model"):
        edge_agent.load(adopted, backbone=str(other))
