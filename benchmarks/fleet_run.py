"""A fleet in this process: the real trainer on a thread, real agents on threads, the in-process broker.

Agents of a tier share a loaded backbone. Nothing else is simulated but the order in which devices of unequal
speed compute (:class:`benchmarks.metered.Turns`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fleet import FleetDevice
from benchmarks.metered import Meter, MeteredBackbone, MeteredModel, Turns
from benchmarks.onlooker import Onlooker
from benchmarks.program import Tell
from benchmarks.workload import JOB, write_examples
from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Transport, Will
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.session.agent import Agent
from edge_agent.weights.adopted import AdoptedWeights, load_adopted
from side_trainer.settings.schema import TrainerConfig
from side_trainer.trainer import run_trainer
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import shared_backbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.contract.errors import StateError
from sidestream.contract.plan import Precision
from sidestream.contract.tasks import Task

_TELL_EVERY_S = 10.0
_START_S = 60.0


@dataclass(kw_only=True)
class FleetRun:
    """What came of a run."""

    adopted: dict[str, AdoptedWeights]
    """By tier: the newest weights that a device of it adopted."""
    device_cpu_s: float
    """Of all devices: the producers' threads."""
    bytes_up: int
    """Payload bytes published by all devices."""
    bytes_down: int
    """Payload bytes that all devices received."""
    rows_forwarded: int
    """For training."""
    tokens_forwarded: int
    """Of a language model: those predicted in these rows."""
    wall_s: float
    """From start to end."""


@dataclass
class _Member:
    """A device while it runs."""

    device: FleetDevice
    folder: Path
    thread: threading.Thread | None = None
    meter: Meter | None = None
    gone: threading.Event = field(default_factory=threading.Event)


class _Crew:
    """Starts agents, each on a thread, lets them come and go, and notes the first failure."""

    def __init__(self, broker: InProcessBroker, devices: Sequence[FleetDevice], folder: Path) -> None:
        self._broker = broker
        self._turns = Turns(device.name for device in devices if device.examples and not device.joins_after)
        self.members = {device.name: _Member(device, folder / device.name) for device in devices}
        self.failure: BaseException | None = None

    def start_due(self) -> None:
        """Start every device whose time has come."""
        for member in self.members.values():
            awaited = member.device.joins_after
            if member.thread is None and (not awaited or self.members[awaited].gone.is_set()):
                if awaited:
                    self._turns.join(member.device.name)
                member.thread = threading.Thread(target=self._run, args=(member,), daemon=True)
                member.thread.start()

    @property
    def running(self) -> bool:
        """Whether a device works or is still to come."""
        return any(one.thread is None or one.thread.is_alive() for one in self.members.values())

    @property
    def meters(self) -> list[Meter]:
        return [one.meter for one in self.members.values() if one.meter is not None]

    @property
    def rows(self) -> int:
        return sum(meter.rows for meter in self.meters)

    def _run(self, member: _Member) -> None:
        device = member.device
        data = DataConfig()
        if device.examples:
            path = write_examples(member.folder / "data.jsonl", device.examples)
            data = DataConfig(path=str(path), held_out_share=0.0)
        config = AgentConfig(
            job=JOB,
            device=device.name,
            tier=device.tier,
            state_dir=str(member.folder / "state"),
            threads=1,
            exit_when_done=True,
            data=data,
        )
        stop = threading.Event()

        def connect(_: AgentConfig, client_id: str, will: Will | None) -> Transport:
            return self._broker.transport(client_id, will=will)

        def load(reference: str, layers: int, precision: Precision, task: Task) -> Backbone:
            member.meter = self._meter(member, stop)
            reference, precision = device.on_device or (reference, precision)
            inner = shared_backbone(reference, layers, precision, task)
            if isinstance(inner, TorchLanguageModel):
                return MeteredModel(inner, member.meter)
            return MeteredBackbone(inner, member.meter)

        try:
            Agent(config, stop=stop, connect=connect, load_backbone=load).run()
        except BaseException as exc:
            self.failure = self.failure or exc
        finally:
            self._turns.leave(device.name)

    def _meter(self, member: _Member, stop: threading.Event) -> Meter:
        device = member.device

        def before(rows: int) -> None:
            self._turns.take(device.name, rows / device.speed)

        def after(rows: int) -> None:
            if device.leaves and rows >= device.rows / 2:
                stop.set()
                member.gone.set()
            if stop.is_set() or rows >= device.rows:
                self._turns.leave(device.name)

        return Meter(before, after)


def run_fleet(config: TrainerConfig, devices: Sequence[FleetDevice], folder: Path, tell: Tell) -> FleetRun:
    """Run a job until every device has adopted the final weights, or has left.

    Args:
        config: The trainer's; its state directory may hold a journal already.
        devices: Who takes part.
        folder: For the devices' data and state.
        tell: Given a line of progress every ten seconds.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        broker = stack.enter_context(InProcessBroker(max_packet_bytes=2_000_000))
        onlooker = Onlooker(broker, config.job, config.tiers)
        stack.callback(onlooker.close)
        stop_trainer, up = threading.Event(), threading.Event()
        crew = _Crew(broker, devices, folder)

        def train() -> None:
            try:
                run_trainer(
                    config,
                    stop_trainer,
                    connect=lambda _, client_id, will: broker.transport(
                        client_id, will=will, max_inflight=64
                    ),
                    started=lambda *_: up.set(),
                )
            except BaseException as exc:
                crew.failure = crew.failure or exc

        trainer = threading.Thread(target=train, daemon=True)
        trainer.start()
        stack.callback(trainer.join, _START_S)
        stack.callback(stop_trainer.set)
        up.wait(_START_S)
        _follow(crew, onlooker, sum(device.rows for device in devices), tell)
        broker.settle()
        told = [one.telemetry for one in onlooker.devices() if one.telemetry is not None]
        return FleetRun(
            adopted=_newest(crew),
            device_cpu_s=sum(meter.cpu_s for meter in crew.meters),
            bytes_up=sum(one.bytes_up for one in told),
            bytes_down=sum(one.bytes_down for one in told),
            rows_forwarded=crew.rows,
            tokens_forwarded=sum(meter.tokens for meter in crew.meters),
            wall_s=time.monotonic() - started,
        )


def _follow(crew: _Crew, onlooker: Onlooker, rows: int, tell: Tell) -> None:
    told_s = time.monotonic()
    while crew.running:
        if crew.failure is not None:
            raise crew.failure
        crew.start_due()
        time.sleep(0.05)
        if time.monotonic() - told_s > _TELL_EVERY_S:
            told_s = time.monotonic()
            forwarded = f"{crew.rows} of {rows} samples forwarded, " if rows else ""
            tell(f"{forwarded}version {onlooker.newest_version} in use")
    if crew.failure is not None:
        raise crew.failure


def _newest(crew: _Crew) -> dict[str, AdoptedWeights]:
    newest: dict[str, AdoptedWeights] = {}
    for member in crew.members.values():
        kept = load_adopted(member.folder / "state")
        tier = member.device.tier
        if kept and (tier not in newest or kept.adopted.version > newest[tier].adopted.version):
            newest[tier] = kept
    versions = {kept.adopted.version for kept in newest.values()}
    if len(newest) < len({member.device.tier for member in crew.members.values()}) or len(versions) > 1:
        raise StateError(f"not every tier adopted the final weights; versions adopted: {sorted(versions)}")
    return newest
