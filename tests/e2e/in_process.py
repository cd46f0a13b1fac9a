"""A fleet in this process: real agents, trainer and transformers classes, and the in-process broker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Transport, Will
from edge_agent.config import AgentConfig, DataConfig, WeightsChoice
from edge_agent.session.agent import Agent
from side_trainer.settings.reload import SettingsFile
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import shared_backbone
from sidestream.contract.messages import Status, Telemetry
from sidestream.contract.plan import Plan, Precision
from sidestream.contract.tasks import Task
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack
from tests.agent.tiny import save_tiny
from tests.e2e.processes import LABELS, write_samples
from tests.trainer.test_trainer import Listener
from tests.until import until

JOB = "colours"  # the listener's
TOPICS = Topics(JOB)


class Kind(NamedTuple):
    """A backbone of the real class, tiny and random."""

    family: str
    layers: int
    width: int


def table(folder: Path, tier: str, kind: Kind, **more: Precision) -> str:
    """A tier's part of the settings file; its backbone is made where it is missing, and loaded.

    To be called before the trainer runs. Making or loading a model draws from torch's randomness, which all
    threads share; a trainer has it for itself where it is a process of its own.
    """
    backbone = folder / f"{kind.family}-{kind.layers}-{kind.width}"
    if not backbone.exists():
        save_tiny(backbone, kind.family, layers=kind.layers, width=kind.width)
    shared_backbone(str(backbone), 0, more.get("precision", "f32"))
    lines = [f"[tiers.{tier}]", f'backbone = "{backbone}"', "batch_size = 8"]
    return "\n".join([*lines, *(f'{name} = "{value}"' for name, value in more.items())]) + "\n"


def settings(folder: Path, tiers: str, *, blocks: int = 3, passes: int = 6, more: str = "") -> SettingsFile:
    """The trainer's file."""
    names = ", ".join(f'"{label}"' for label in LABELS)
    path = folder / "trainer.toml"
    path.write_text(
        f'job = "{JOB}"\nstate_dir = "{folder / "trainer"}"\nlabels = [{names}]\nmetrics_port = -1\n'
        f"idle_after_s = 0.2\npublish_every_s = 0.05\n{more}"
        f"[learner]\nseed = 3\npasses = {passes}\n"
        f"[side_network]\nblocks = {blocks}\nwidth = 48\ninner = 48\n{tiers}"
    )
    return SettingsFile(path)


@contextmanager
def agent(
    broker: InProcessBroker,
    folder: Path,
    tier: str,
    *,
    samples: int,
    trace: str = "",
    reference: str = "",
    weights: WeightsChoice = "every",
    backbone: Callable[[Backbone], Any] = lambda loaded: loaded,
    transport: Callable[[Transport], Any] = lambda real: real,
) -> Iterator[Path]:
    """A device of a tier, named after it; gives the file that it watches for more samples.

    ``reference`` says where its backbone is. ``backbone`` and ``transport`` may put something between the
    agent and its own.
    """
    held = write_samples(folder / f"{tier}-held.jsonl", 90, seed=f"{tier} held")
    data = write_samples(folder / f"{tier}.jsonl", samples, seed=tier)
    config = AgentConfig(
        job=JOB,
        device=f"{tier}-1",
        tier=tier,
        state_dir=str(folder / f"state-{tier}"),
        telemetry_every_s=0.1,
        trace_path=trace,
        backbone=reference,
        weights=weights,
        data=DataConfig(path=str(data), evaluation_path=str(held), watch=True, poll_s=0.05),
    )
    stop = threading.Event()
    failures: list[BaseException] = []

    def connect(_: AgentConfig, client_id: str, will: Will | None) -> Transport:
        between: Transport = transport(broker.transport(client_id, will=will))
        return between

    def load(reference: str, layers: int, precision: Precision, task: Task) -> Backbone:
        between: Backbone = backbone(shared_backbone(reference, layers, precision))
        return between

    def run() -> None:
        try:
            Agent(config, stop=stop, connect=connect, load_backbone=load).run()
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

    until(lambda: all(measured(tier) for tier in trained), "every tier measures final weights")
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
