"""A fleet of a split job in one thread: the real rooms of both sides, and clocks that are only counted.

Outboxes, halves, journal and fold are the agents' and the trainer's own, and what they say is packed as it
travels; there is no broker and no waiting. Whose clock is the furthest behind acts next, so that batches come
in the order in which devices of those speeds would send them, and every run is the same again.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, cast

import msgspec
from prometheus_client import CollectorRegistry

from benchmarks.fleet import FleetDevice
from benchmarks.program import Tell
from benchmarks.workload import JOB, write_examples
from broker_config.testing.inprocess import InProcessBroker
from edge_agent.batches.patience import Patience
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.context import AgentContext
from edge_agent.samples.sources import open_source
from edge_agent.split_lora.adapters import DeviceAdapters, HeldAdapters, OwnAdapters
from edge_agent.split_lora.departures import Departures
from edge_agent.split_lora.exchange import Exchange
from edge_agent.split_lora.frozen import FrozenUpload
from edge_agent.split_lora.intake import BatchIntake
from edge_agent.split_lora.prepared import Preparer
from edge_agent.split_lora.stored_batches import StoredBatches
from edge_agent.split_lora.writing import Writer
from edge_agent.store.outbox import Outbox
from edge_agent.weights.adoption import Adopter, InUse
from edge_agent.weights.trust import Trust
from metrics.catalogue import AgentMetrics
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import RecordKind
from side_trainer.receive.adapter_messages import examine_adapter
from side_trainer.receive.inbox import arrived, examine
from side_trainer.settings.implied import with_implied
from side_trainer.settings.schema import TrainerConfig
from side_trainer.split_lora.frozen import SplitFrozenMethod
from side_trainer.split_lora.split import SplitMethod
from sidestream.backbone.runtimes import shared_backbone
from sidestream.contract.messages import GradientReply, Receipt, is_adapter_message
from sidestream.contract.plan import Plan, SplitLora
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import TARGET_MESSAGE_BYTES, pack
from sidestream.host.trace import Trace
from sidestream.split_model.adapter_bundle import decode_adapters
from sidestream.split_model.loading import local_steps, lower_half

_BACKWARD: Final = 2.0  # a backward pass, in forward passes
_TELL_EVERY_S: Final = 20.0
_A_MOMENT: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What is wrong with the way back to the devices."""

    late: int = 0
    """An answer reaches its device when so many more of the device's batches have been answered."""
    lost: float = 0.0
    """The share of answers that come without their gradient."""
    trainer_speed: float = 10.0
    """Of the trainer, in devices."""


@dataclass(kw_only=True)
class SplitRun:
    """What came of a run."""

    weights: dict[str, Floats]
    """Learnt."""
    cuts: dict[str, int]
    """By tier."""
    device_cpu_s: float = 0.0
    """Of all devices together."""
    trainer_cpu_s: float = 0.0
    """Serving, stepping and reading."""
    bytes_up: int = 0
    """Payloads that all devices sent."""
    bytes_down: int = 0
    """Payloads that all devices received: answers and adapters."""
    samples: int = 0
    """That all devices have."""
    batches: int = 0
    """That devices forwarded, over all passes."""
    passes: int = 1
    """How often they forwarded each sample."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of all devices' outboxes."""
    staleness: float = 0.0
    """Batches that were served between a batch and what its device made of the answer, in the mean."""
    rounds: int = 0
    """Of averaging."""
    versions: int = 0
    """Of adapters that were published."""
    duration: float = 0.0
    """By the counted clocks, in forward passes of one batch through one layer on a device."""
    wall_s: float = 0.0


def split_config(state_dir: Path, tiers: Mapping[str, int], backbone: str, **settings: Any) -> TrainerConfig:
    """The trainer's settings with all that the method implies; ``tier`` is of every tier."""
    own = settings.pop("tier", {})
    given = {
        "job": JOB,
        "state_dir": str(state_dir),
        "method": "split-lora",
        "tiers": {name: {"backbone": backbone, "cut": cut, **own} for name, cut in tiers.items()},
        **settings,
    }
    return msgspec.convert(with_implied(given), TrainerConfig).checked()


def passes_of(plan: Plan) -> int:
    """How often devices forward each sample."""
    return plan.method.passes if isinstance(plan.method, SplitLora) else 1


class _Trainer:
    """Journal, fold and what is told to devices.

    Args:
        config: Settings.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self.config = config
        folder = Path(config.state_dir)
        folder.mkdir(parents=True)
        self.journal = Journal(folder / FILE_NAME)
        self.plan: Plan = Job(config, self.journal).plan
        self.fold = Fold(self.journal)
        self.replies: deque[tuple[str, GradientReply]] = deque()
        self.staleness: list[int] = []
        self.cpu_s = 0.0
        self.versions = 0
        self._before: dict[str, Floats] = {}
        self.catch_up()

    @property
    def method(self) -> SplitMethod:
        assert isinstance(self.fold.method, SplitMethod)
        return self.fold.method

    def take(self, device: FleetDevice, payload: bytes) -> Receipt:
        """Journal a message."""
        read = examine_adapter if is_adapter_message(payload) else examine
        batch = read(payload, device.tier, self.plan).batch
        with self.journal.transaction():
            self.journal.append_batch(arrived(batch, payload, device.tier, device.name))
        state = self.journal.stream(batch.stream)
        assert state is not None
        upto = state.watermark
        return Receipt(stream=batch.stream, upto=upto, digest=self.journal.content(batch.stream, upto), fence=1)

    def catch_up(self) -> None:
        """Fold what is there."""
        while records := self.journal.read(self.fold.offset, limit=16):
            for record in records:
                step = self.fold.apply(record)
                if record.kind == RecordKind.UPDATE.value:
                    self.staleness.append(step.staleness or 0)
                for reply in step.replies:
                    state = self.journal.stream(reply.stream)
                    assert state is not None
                    self.replies.append((state.device, reply.message))

    def serve(self, now: float) -> bool:
        """Do one thing that the method owes; return whether it owed any."""
        own = self.method.next_own(now)
        if own is not None:
            self.journal.append(own[0].value, own[1])
            self.catch_up()
        return own is not None

    def idle(self) -> bool:
        """Go on with the passes over the journal; return whether any are owed."""
        settings, method = self.config.learner, self.method
        if method.owed(settings.passes) <= 0:
            return False
        record = method.next_idle(settings.passes, settings.pass_rows, self.fold.offset)
        self.journal.append(RecordKind.IDLE.value, msgspec.json.encode(record))
        self.catch_up()
        return True

    def release(self) -> dict[str, bytes]:
        """New adapters by tier, if they are to be published."""
        method = self.method
        if not method.has_weights or isinstance(method, SplitFrozenMethod):
            return {}
        now = method.weights()
        if self._before and method.moved_by(self._before, now) < self.config.publish_change:
            return {}
        self._before = now
        self.versions += 1
        version = self.journal.version_base + self.fold.offset
        return dict(method.bundles(self.journal.run, version, self.config.weights_codec))


@dataclass
class _Adopted:
    """What a device's half asks its adopter for."""

    in_use: InUse | None = None


class _Device:
    """One device: its exchange, and what it waits for."""

    def __init__(self, about: FleetDevice, plan: Plan, folder: Path, message_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.about = about
        self.clock = 0.0
        self.cpu_s = 0.0
        self.done = False
        self.batches = 0
        self.held_back: deque[GradientReply] = deque()
        self.replies: SimpleQueue[GradientReply] = SimpleQueue()
        self.adopted = _Adopted()
        self._plan = plan
        tier, method = plan.tiers[about.tier], plan.method
        self.cut = tier.layers
        self.outbox = Outbox(folder, job=JOB, device=about.name, tier=about.tier, max_bytes=2**30)
        self.outbox.begin_run(plan.run)
        data = DataConfig(path=str(write_examples(folder / "data.jsonl", about.examples)), held_out_share=0.0)
        context = _context(self.outbox, data)
        backbone = shared_backbone(tier.backbone, tier.layers, "f32", plan.task)
        patience = Patience("computing waits", lambda: False)
        preparer, writer = Preparer(backbone, plan, about.tier), Writer(plan, about.tier)
        passes = passes_of(plan)
        batches = StoredBatches(self.outbox, passes)
        self.source = open_source(data, folder)
        intake = BatchIntake(
            *(self.source, self.outbox, preparer, writer, batches),
            batch_size=tier.batch_size,
            max_message_bytes=message_bytes,
            held_out_share=0.0,
            patience=patience,
        )
        reuse = method.reuse_below if isinstance(method, SplitLora) and passes > 1 else 0.0
        departures = Departures(
            *(context, batches, writer), reuse_below=reuse, patience=patience, on_batch=lambda: None
        )
        self._frozen: FrozenUpload | None = None
        self._exchange: Exchange | None = None
        self._intake, self._batches = intake, batches
        if not isinstance(method, SplitLora):
            parts = (context, backbone, intake, batches, departures)
            self._frozen = FrozenUpload(*parts, pad=preparer.pad, patience=patience)
            return
        lower = lower_half(backbone, method.lora)
        adopter = cast(Adopter, self.adopted)
        adapters: DeviceAdapters = HeldAdapters(lower, adopter, writer, in_step=method.window == 1)
        if method.adapters == "local":
            adapters = OwnAdapters(
                *(lower, adopter, writer, local_steps(lower, method.round), method.round, self.outbox),
                patience=patience,
                on_batch=lambda: None,
            )
        self._exchange = Exchange(
            *(context, method.window, intake, batches, departures, writer, adapters),
            replies=self.replies,
            pad=preparer.pad,
            patience=patience,
            on_batch=lambda: None,
        )

    def step(self) -> bool:
        """Do what can be done now; return whether there was anything. The clock goes on by what that takes."""
        began, before = time.thread_time(), self._batches.done
        answers = self.replies.qsize()
        busy = self._step()
        self.cpu_s += time.thread_time() - began
        sent = self._batches.done - before
        self.batches += sent
        passes = sent + _BACKWARD * answers
        self.clock += max(self.cut * passes / self.about.speed, _A_MOMENT)
        return busy

    def _step(self) -> bool:
        if self._exchange is not None:
            busy = self._exchange._step()
            self.done = not busy and self._exchange._is_done()
            return busy
        assert self._frozen is not None
        busy = False if self._intake.ended else self._intake.read()
        busy = self._frozen._send_next() or busy
        self.done = not busy
        return busy

    def hear(self, late: int) -> None:
        """What has been held back for long enough reaches it."""
        while len(self.held_back) > late:
            self.replies.put(self.held_back.popleft())

    def adopt(self, version: int, bundle: bytes) -> None:
        self.adopted.in_use = InUse(self._plan.run, version, "", decode_adapters(bundle), None)

    def close(self) -> None:
        self.source.close()
        self.outbox.close()


def _context(outbox: Outbox, data: DataConfig) -> AgentContext:
    return AgentContext(
        config=AgentConfig(job=JOB, data=data),
        instance="",
        client_id="",
        outbox=outbox,
        evaluation_rows=(),
        stream=None,
        connect=lambda *_: InProcessBroker().transport(""),
        load_backbone=lambda *_: shared_backbone(""),
        metrics=AgentMetrics(CollectorRegistry()),
        stop=cast(Any, None),
        trace=Trace(),
        trust=cast(Trust, None),
    )


class SplitFleet:
    """See the module.

    Args:
        config: The trainer's settings, with labels where the task has any.
        devices: Who takes part.
        folder: For the devices' data and state.
        weather: Of the way back.
        seed: Decides what is lost, and the order of a device's batches.
        tell: Given progress.
    """

    def __init__(
        self,
        config: TrainerConfig,
        devices: Sequence[FleetDevice],
        folder: Path,
        *,
        weather: Weather,
        seed: int,
        tell: Tell,
    ) -> None:
        random.seed(seed)  # a device draws the order of its batches
        self._lots = random.Random(seed)
        self._weather = weather
        self._tell = tell
        self._trainer = _Trainer(config)
        self._clock = 0.0
        plan, size = self._trainer.plan, TARGET_MESSAGE_BYTES
        self._devices = {one.name: _Device(one, plan, folder / one.name, size) for one in devices}
        cuts = {name: tier.layers for name, tier in plan.tiers.items()}
        samples = sum(len(one.examples) for one in devices)
        self._run = SplitRun(weights={}, cuts=cuts, samples=samples, passes=passes_of(plan))

    def run(self) -> SplitRun:
        """Let everybody act until nothing is left to do."""
        started = told = time.monotonic()
        idle: set[str] = set()  # who could do nothing when it was last asked
        self._publish(idle)
        while not all(device.done for device in self._devices.values()):
            self._turn(idle)
            if time.monotonic() - told > _TELL_EVERY_S:
                told = time.monotonic()
                self._tell(f"{self._trainer.method.steps} updates, {len(idle)} devices wait")
        while self._on_trainer(self._trainer.idle):
            if time.monotonic() - told > _TELL_EVERY_S:
                told = time.monotonic()
                self._tell(f"{self._trainer.method.steps} updates")
        return self._finished(time.monotonic() - started)

    def _turn(self, idle: set[str]) -> None:
        acting = [one for name, one in self._devices.items() if not one.done and name not in idle]
        first = min(acting, key=lambda one: one.clock, default=None)
        if first is not None and first.clock <= self._clock:
            self._act(first, idle)
        elif self._on_trainer(lambda: self._trainer.serve(self._clock)):
            self._deliver(idle)
            self._publish(idle)
        elif first is not None:
            self._clock = first.clock
        elif not self._flush(idle):
            raise AssertionError("nobody can do anything")

    def _act(self, device: _Device, idle: set[str]) -> None:
        if not device.step():
            idle.add(device.about.name)
        while waiting := device.outbox.streams.waiting(0, 16):
            for one in waiting:
                self._run.bytes_up += len(one.payload)
                began = time.thread_time()
                receipt = self._trainer.take(device.about, one.payload)
                self._trainer.cpu_s += time.thread_time() - began
                device.outbox.streams.receipt(receipt)
        before = self._trainer.method.updates
        self._on_trainer(self._caught_up)
        if self._trainer.method.updates > before:
            self._deliver(idle)
            self._publish(idle)

    def _caught_up(self) -> bool:
        before = self._trainer.fold.offset
        self._trainer.catch_up()
        return self._trainer.fold.offset > before

    def _on_trainer(self, work: Any) -> bool:
        began, steps = time.thread_time(), self._trainer.method.steps
        busy = bool(work())
        self._trainer.cpu_s += time.thread_time() - began
        depth, speed = self._trainer.method.model.depth, self._weather.trainer_speed
        mean_cut = sum(self._run.cuts.values()) / len(self._run.cuts)
        steps = self._trainer.method.steps - steps
        self._clock += steps * (1 + _BACKWARD) * (depth - mean_cut) / speed
        return busy

    def _deliver(self, idle: set[str]) -> None:
        replies = self._trainer.replies
        while replies:
            name, message = replies.popleft()
            device = self._devices[name]
            self._run.bytes_down += len(pack(message))
            if message.gradient is not None and self._lots.random() < self._weather.lost:
                message = msgspec.structs.replace(message, gradient=None, refused="it was lost")
            if message.gradient is None:
                device.replies.put(message)
            else:
                device.held_back.append(message)
            device.hear(self._weather.late)
            self._wake(device, idle)

    def _flush(self, idle: set[str]) -> bool:
        """Nobody sends any more: what was held back arrives."""
        held = [device for device in self._devices.values() if device.held_back]
        for device in held:
            device.hear(0)
            self._wake(device, idle)
        return bool(held)

    def _publish(self, idle: set[str]) -> None:
        bundles = self._trainer.release()
        version = self._trainer.journal.version_base + self._trainer.fold.offset
        for device in self._devices.values():
            if bundles and not device.done:
                device.adopt(version, bundles[device.about.tier])
                self._run.bytes_down += len(bundles[device.about.tier])
                self._wake(device, idle)

    def _wake(self, device: _Device, idle: set[str]) -> None:
        if device.about.name in idle:
            idle.discard(device.about.name)
            device.clock = max(device.clock, self._clock)

    def _finished(self, wall_s: float) -> SplitRun:
        run, trainer = self._run, self._trainer
        run.weights = trainer.method.weights()
        run.device_cpu_s = sum(device.cpu_s for device in self._devices.values())
        run.batches = sum(device.batches for device in self._devices.values())
        run.trainer_cpu_s = trainer.cpu_s
        for device in self._devices.values():
            for name, value in device.outbox.counters().items():
                run.counts[name] = run.counts.get(name, 0) + value
            device.close()
        run.staleness = sum(trainer.staleness) / max(1, len(trainer.staleness))
        run.rounds, run.versions = trainer.method.rounds, trainer.versions
        run.duration = max([self._clock, *(device.clock for device in self._devices.values())])
        run.wall_s = wall_s
        trainer.journal.close()
        return run
