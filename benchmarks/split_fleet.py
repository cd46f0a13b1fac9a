"""A fleet of a split job in one thread: the real rooms of both sides, and clocks that are only counted.

Outboxes, halves, journal and fold are the agents' and the trainer's own, and what they say is packed as it
travels; there is no broker and no waiting. Whose clock is the furthest behind acts next, so that batches come
in the order in which devices of those speeds would send them, and every run is the same again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.fleet import FleetDevice
from benchmarks.program import Tell
from benchmarks.split_ends import BACKWARD, DeviceEnd, TrainerEnd, passes_of
from benchmarks.workload import JOB
from side_trainer.settings.implied import with_implied
from side_trainer.settings.schema import TrainerConfig
from side_trainer.split_lora.method import SplitLoraMethod
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import TARGET_MESSAGE_BYTES, pack

_TELL_EVERY_S: Final = 20.0


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
    layers: dict[str, int | None] = field(default_factory=dict)
    """By weight, the layer that it is in."""
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
    """What the run took here."""

    @property
    def backwards(self) -> float:
        """Backward passes a sample, on its device."""
        return self.counts.get("backward_passes", 0) / max(1, self.batches) * self.passes


def above(weights: Mapping[str, Floats], layers: Mapping[str, int | None], cut: int) -> dict[str, Floats]:
    """The weights above a cut; those of the layers below it, which frozen devices do not have, are zero."""
    return {
        name: np.zeros_like(array) if (layer := layers[name]) is not None and layer < cut else array
        for name, array in weights.items()
    }


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
        self._trainer = TrainerEnd(config)
        self._clock = 0.0
        if isinstance(method := self._trainer.method, SplitLoraMethod):
            method.turns.clock = lambda: self._clock
        plan, size = self._trainer.plan, TARGET_MESSAGE_BYTES
        self._devices = {one.name: DeviceEnd(one, plan, folder / one.name, size) for one in devices}
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

    def _act(self, device: DeviceEnd, idle: set[str]) -> None:
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
        self._clock += steps * (1 + BACKWARD) * (depth - mean_cut) / speed
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

    def _wake(self, device: DeviceEnd, idle: set[str]) -> None:
        if device.about.name in idle:
            idle.discard(device.about.name)
            device.clock = max(device.clock, self._clock)

    def _finished(self, wall_s: float) -> SplitRun:
        run, trainer = self._run, self._trainer
        run.weights, model = trainer.method.weights(), trainer.method.model
        run.layers = {name: model.layer_of(name) for name in run.weights}
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
