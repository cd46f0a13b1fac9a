"""One fleet, one side-network: backbones of unequal depth, width, kind and precision learn together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from broker_config.testing.inprocess import InProcessBroker
from side_trainer.operator.audit import verify
from side_trainer.operator.status import read_state
from sidestream.contract.plan import Precision, SideNetworkSpec
from tests.agent.exported import exported
from tests.e2e.in_process import Kind, accuracies, agent, births, plan_of, settings, table
from tests.trainer.test_trainer import Listener, trainer
from tests.until import until

KINDS = {"encoder": Kind("roberta", 4, 32), "decoder": Kind("opt", 6, 48), "modern": Kind("llama", 3, 64)}
LATE = Kind("bert", 5, 40)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker(max_packet_bytes=2_000_000) as running:
        yield running


def test_encoder_and_decoders_of_unequal_depth_and_width_share_one_side_network(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    """And a tier of yet another width joins half-way, trains from then on, and disturbs nobody."""
    file = settings(tmp_path, "".join(table(tmp_path, tier, kind) for tier, kind in KINDS.items()))
    late = table(tmp_path, "late", LATE)
    with ExitStack() as stack:
        stack.enter_context(trainer(broker, file.load(), file))
        listener = Listener(broker.transport("watch"))
        for tier in KINDS:
            stack.enter_context(agent(broker, tmp_path, tier, samples=120))
        before = accuracies(listener, dict.fromkeys(KINDS, 120))
        first, born = plan_of(listener), {tier: births(listener, tier) for tier in KINDS}
        assert {tier: (one.depth, one.width, one.taps) for tier, one in first.tiers.items()} == {
            "encoder": (4, 32, (2, 3, 4)),
            "decoder": (6, 48, (2, 4, 6)),
            "modern": (3, 64, (1, 2, 3)),
        }
        assert min(before.values()) > 0.9, before

        path = tmp_path / "trainer.toml"
        path.write_text(path.read_text() + late)
        file.asked.set()
        until(lambda: "late" in plan_of(listener).tiers, "the plan has the tier")
        stack.enter_context(agent(broker, tmp_path, "late", samples=240))
        after = accuracies(listener, {**dict.fromkeys(KINDS, 120), "late": 240})
        assert after["late"] > 0.9 and min(after.values()) > 0.9, after
        assert all(after[tier] >= before[tier] - 0.03 for tier in before), (before, after)
        last = plan_of(listener)
        assert last.tiers["late"].width == 40 and last.run == first.run
        assert {tier: last.tiers[tier] for tier in KINDS} == first.tiers, "the others' part is the same"
        assert {tier: births(listener, tier) for tier in KINDS} == born, "and their sessions go on"
    state = read_state(tmp_path / "trainer")
    assert state.samples_trained_unique == state.samples == 600
    assert verify(tmp_path / "trainer").matches


@pytest.mark.parametrize("blocks", [1, 2])
def test_fewer_blocks_than_the_shallowest_backbone_has_layers(
    broker: InProcessBroker, tmp_path: Path, blocks: int
) -> None:
    file = settings(
        tmp_path, "".join(table(tmp_path, tier, kind) for tier, kind in KINDS.items()), blocks=blocks
    )
    with ExitStack() as stack:
        stack.enter_context(trainer(broker, file.load()))
        listener = Listener(broker.transport("watch"))
        for tier in KINDS:
            stack.enter_context(agent(broker, tmp_path, tier, samples=120))
        reached = accuracies(listener, dict.fromkeys(KINDS, 120))
        plan = plan_of(listener)
    assert plan.side_network == SideNetworkSpec(blocks=blocks, width=48, inner=48)
    assert {tier: len(one.taps) for tier, one in plan.tiers.items()} == dict.fromkeys(KINDS, blocks)
    assert all(one.taps[-1] == KINDS[tier].layers for tier, one in plan.tiers.items())
    assert min(reached.values()) > 0.9, reached


def test_tiers_of_one_backbone_in_three_precisions_share_map_and_side_network(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    precisions: tuple[Precision, ...] = ("f32", "bf16", "int8")
    tiers = "".join(table(tmp_path, one, KINDS["decoder"], precision=one) for one in precisions)
    file = settings(tmp_path, tiers)
    with ExitStack() as stack:
        stack.enter_context(trainer(broker, file.load()))
        listener = Listener(broker.transport("watch"))
        for tier in precisions:
            stack.enter_context(agent(broker, tmp_path, tier, samples=60))
        reached = accuracies(listener, dict.fromkeys(precisions, 60))
        plan = plan_of(listener)
    assert {tier: one.precision for tier, one in plan.tiers.items()} == {one: one for one in precisions}
    assert len({(one.fingerprint, one.align) for one in plan.tiers.values()}) == 1
    assert min(reached.values()) > 0.9, reached


def test_devices_with_torch_and_with_onnxruntime_in_two_precisions_share_map_and_side_network(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    """The plan names the model; two of three devices have it exported, one of them in fewer bits."""
    names = ("torch", "onnx", "small")
    file = settings(tmp_path, "".join(table(tmp_path, one, KINDS["encoder"]) for one in names))
    model = tmp_path / "roberta-4-32"
    places = {
        "torch": "",
        "onnx": str(exported(model, tmp_path / "f32")),
        "small": str(exported(model, tmp_path / "int8", "int8")),
    }
    with ExitStack() as stack:
        stack.enter_context(trainer(broker, file.load()))
        listener = Listener(broker.transport("watch"))
        for tier in names:
            stack.enter_context(agent(broker, tmp_path, tier, samples=60, reference=places[tier]))
        reached = accuracies(listener, dict.fromkeys(names, 60))
        plan = plan_of(listener)
    assert {one.backbone for one in plan.tiers.values()} == {str(model)}
    assert len({(one.fingerprint, one.align) for one in plan.tiers.values()}) == 1
    assert min(reached.values()) > 0.9, reached
