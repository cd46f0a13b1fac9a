"""One fleet, one side-network: backbones of unequal depth, width, kind and precision learn together.

Real agents, the real trainer and real transformers classes, in one process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from broker_config.inprocess import InProcessBroker
from broker_config.transport import Transport, Will
from contract.messages import Status, Telemetry
from contract.plan import Plan, Precision, SideNetworkSpec
from contract.topics import Topics
from contract.wire import unpack
from edge_agent.agent import Agent
from edge_agent.config import AgentConfig, DataConfig
from side_trainer.audit import read_state, verify
from side_trainer.reload import SettingsFile
from tests.agent.tiny import save_tiny
from tests.e2e.processes import LABELS, write_samples
from tests.trainer.test_trainer import Listener, trainer, until

JOB = "colours"  # the listener's
TOPICS = Topics(JOB)
PATIENCE_S = 90.0


class Kind(NamedTuple):
    """A backbone of the real class, tiny and random."""

    family: str
    layers: int
    width: int


KINDS = {"encoder": Kind("roberta", 4, 32), "decoder": Kind("opt", 6, 48), "modern": Kind("llama", 3, 64)}
LATE = Kind("bert", 5, 40)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker(max_packet_bytes=2_000_000) as running:
        yield running


def table(folder: Path, tier: str, kind: Kind, **more: object) -> str:
    """A tier's part of the settings file; its backbone is made where it is missing."""
    backbone = folder / f"{kind.family}-{kind.layers}-{kind.width}"
    if not backbone.exists():
        save_tiny(backbone, kind.family, layers=kind.layers, width=kind.width)
    lines = [f"[tiers.{tier}]", f'backbone = "{backbone}"', "batch_size = 8"]
    return "\n".join([*lines, *(f'{name} = "{value}"' for name, value in more.items())]) + "\n"


def settings(folder: Path, tiers: str, *, blocks: int = 3) -> SettingsFile:
    """The trainer's file."""
    names = ", ".join(f'"{label}"' for label in LABELS)
    path = folder / "trainer.toml"
    path.write_text(
        f'job = "{JOB}"\nstate_dir = "{folder / "trainer"}"\nlabels = [{names}]\nmetrics_port = -1\n'
        "idle_after_s = 0.2\npublish_every_s = 0.05\n"
        f"[learner]\nseed = 3\npasses = 6\n[side_network]\nblocks = {blocks}\nwidth = 48\ninner = 48\n{tiers}"
    )
    return SettingsFile(path)


@contextmanager
def agent(broker: InProcessBroker, folder: Path, tier: str, *, samples: int) -> Iterator[Path]:
    """A device of a tier, named after it; gives the file that it watches for more samples."""
    held = write_samples(folder / f"{tier}-held.jsonl", 90, seed=f"{tier} held")
    data = write_samples(folder / f"{tier}.jsonl", samples, seed=tier)
    config = AgentConfig(
        job=JOB,
        device=f"{tier}-1",
        tier=tier,
        state_dir=str(folder / f"state-{tier}"),
        telemetry_every_s=0.1,
        data=DataConfig(path=str(data), evaluation_path=str(held), watch=True, poll_s=0.05),
    )
    stop, failures = threading.Event(), []

    def connect(_: AgentConfig, client_id: str, will: Will | None) -> Transport:
        return broker.transport(client_id, will=will)

    def run() -> None:
        try:
            Agent(config, stop=stop, connect=connect).run()
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield data
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
    assert not failures, failures


def told(listener: Listener, tier: str) -> Telemetry | None:
    return listener.last(TOPICS.telemetry(tier, f"{tier}-1"), Telemetry)


def accuracies(listener: Listener, trained: Mapping[str, int]) -> dict[str, float]:
    """By tier, of the final weights that have learnt so many samples in all, as its device measured them."""
    samples = sum(trained.values())

    def measured(tier: str) -> bool:
        manifest, word = listener.manifest(tier), told(listener, tier)
        final = manifest is not None and manifest.final and manifest.samples == samples
        return bool(final and word and word.accuracy and word.weights_version == manifest.version)  # type: ignore[union-attr]

    until(lambda: all(measured(tier) for tier in trained), "every tier measures final weights", PATIENCE_S)
    words = {tier: told(listener, tier) for tier in trained}
    assert all(word and word.samples_forwarded == trained[tier] for tier, word in words.items())
    return {tier: word.accuracy or 0.0 for tier, word in words.items() if word}


def births(listener: Listener, tier: str) -> set[int]:
    topic = TOPICS.status(tier, f"{tier}-1")
    told = [event for event in list(listener.seen) if event.topic == topic and event.payload]
    return {unpack(Status, event.payload).birth for event in told}


def plan_of(listener: Listener) -> Plan:
    plan = listener.plan()
    assert plan is not None
    return plan


def test_encoder_and_decoders_of_unequal_depth_and_width_share_one_side_network(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    """And a tier of yet another width joins half-way, trains from then on, and disturbs nobody."""
    file = settings(tmp_path, "".join(table(tmp_path, tier, kind) for tier, kind in KINDS.items()))
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
        path.write_text(path.read_text() + table(tmp_path, "late", LATE))
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
