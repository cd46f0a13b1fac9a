"""Devices made of numbers, of five kinds: what they would measure under whatever is assigned to them.

A device's figures follow from its setting by the proportions that hold on real boards, roughly: memory is a
model's plus what a batch's tokens take; time goes with tokens and layers; a board's rise above the room goes
with how long it computes; a link is busy for the bytes that a sample takes. On all of it lies noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final

import msgspec

from side_trainer.autotune.choices import Choices, Setting
from side_trainer.autotune.governor import Accuracy, Choice, Governor
from side_trainer.autotune.window import Meter
from side_trainer.journal.records import AssignmentRecord, Quantity
from side_trainer.settings.tuning import TuningConfig, assignable
from sidestream.contract.messages import Telemetry
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.tasks import Task

HOUR_S: Final = 3600.0
REPORT_S: Final = 600.0
TUNING: Final = TuningConfig()
START_UNIX_S: Final = 1.7e9
MIB: Final = 2**20


def plan(tuning: TuningConfig = TUNING, **tier: object) -> Plan:
    """A job with a deep and a shallow tier of one backbone."""
    made = {}
    for name, depth, taps in (("deep", 6, (1, 3, 6)), ("shallow", 3, (1, 3))):
        one = TierPlan(
            backbone="m",
            align="m",
            depth=depth,
            width=384,
            taps=taps,
            fingerprint="f",
            **tier,  # type: ignore[arg-type]
        )
        made[name] = msgspec.structs.replace(
            one, assignable=assignable(one, Task.TEXT_CLASSIFICATION, tuning)
        )
    return Plan(
        job="j", run="ab" * 16, revision=1, task=Task.TEXT_CLASSIFICATION, labels=("a", "b"), tiers=made
    )


def choices(tier: str, tuning: TuningConfig = TUNING, **changes: object) -> Choices:
    found = Choices.of(tier, plan(tuning, **changes), tuning.tiers)
    assert found is not None
    return found


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a device is made of."""

    tier: str
    token_s: float
    """Forward seconds a token in six layers."""
    memory_mib: float
    """What the agent may have."""
    model_mib: float = 120.0
    token_mib: float = 0.05
    """What a token of a batch takes."""
    link_bytes_s: float = 1e6
    samples_s: float = 0.05
    """How many come in."""
    degrees: float = 20.0
    """By which it would be warmer than the room if it computed all the time."""
    throttles: bool = False
    """Whether it computes at half its speed every other quarter of an hour, once it is hot."""
    alternates_h: float = 0.0
    """Every so many hours time and link are four times as bad, or are good again."""


KINDS: Final[Mapping[str, Kind]] = {
    "fast": Kind(tier="deep", token_s=0.002, memory_mib=4000),
    "short of memory": Kind(tier="deep", token_s=0.01, memory_mib=240),
    "hot": Kind(tier="deep", token_s=0.03, memory_mib=2000, degrees=100, throttles=True, samples_s=0.2),
    "thin link": Kind(tier="deep", token_s=0.003, memory_mib=2000, link_bytes_s=100.0),
    "alternating": Kind(tier="shallow", token_s=0.015, memory_mib=2000, link_bytes_s=600.0, alternates_h=5.0),
}
"""Five kinds."""


@dataclass(kw_only=True)
class Device:
    """One of them, with its meter and its governor, and the records of what was chosen for it."""

    name: str
    kind: Kind
    tuning: TuningConfig = TUNING
    seed: int = 0
    noise: float = 0.1
    records: list[AssignmentRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = Random(f"{self.name} {self.seed}")
        self.luck = math.exp(self.rng.gauss(0, 0.1))  # no two boards are alike
        self.samples, self.forward_s, self.sending_s = 0.0, 0.0, 0.0
        self.loads: list[tuple[float, float, float]] = []
        self.restart()

    def restart(self) -> None:
        """As a trainer that starts anew has it: all that is left is the records."""
        self.governor = Governor(choices(self.kind.tier, self.tuning), self.tuning)
        for record in self.records:
            self.governor.apply(record)
        self.meter = Meter(self.tuning.window_h * HOUR_S)

    @property
    def setting(self) -> Setting:
        return self.governor.setting

    def live(self, now: float, accuracies: Mapping[str, Accuracy]) -> Choice | None:
        """Work for one report's time, and report; what was chosen by that."""
        told = self._report(now)
        measured = self.meter.add(told, now, len(self.records))
        if measured is None:
            return None
        choice = self.governor.decide(measured, START_UNIX_S + now, accuracies)
        if choice is not None:
            self.records.append(record_of(choice, self.kind.tier, self.name, START_UNIX_S + now))
            self.governor.apply(self.records[-1])
        return choice

    def _noisy(self, value: float) -> float:
        return value * self.luck * math.exp(self.rng.gauss(0, self.noise))

    def _report(self, now: float) -> Telemetry:
        kind, setting, known = self.kind, self.setting, self.governor.choices
        bad = kind.alternates_h and (now / HOUR_S // kind.alternates_h) % 2
        slower = 4.0 if bad else 1.0
        depth = known.depth_of(known.own) / 6
        tokens = min(setting.max_tokens, 100)
        sample_s = self._noisy(kind.token_s * tokens * depth * slower)
        hot = kind.degrees * min(1.0, sample_s * kind.samples_s) > 45
        if kind.throttles and hot and (now // 900) % 2:
            sample_s *= 2
        busy = min(1.0, sample_s * kind.samples_s)
        computed = REPORT_S * busy / sample_s
        taken = self._noisy(known.bytes_of(setting) * slower / kind.link_bytes_s)
        self.samples += computed
        self.forward_s += computed * sample_s
        self.sending_s += min(REPORT_S, computed * taken)
        rss = min(kind.memory_mib, self._noisy(kind.model_mib + setting.batch_size * tokens * kind.token_mib))
        celsius = 25 + kind.degrees * busy + self.rng.gauss(0, 1)
        self.loads.append((rss / kind.memory_mib, celsius, min(1.0, computed * taken / REPORT_S)))
        return Telemetry(
            stream="0" * 32,
            samples_forwarded=int(self.samples),
            forward_seconds=self.forward_s,
            sending_seconds=self.sending_s,
            rss_bytes=int(rss * MIB),
            memory_free_bytes=int((kind.memory_mib - rss) * MIB),
            temperature_celsius=celsius,
            assignment=len(self.records),
        )


def record_of(choice: Choice, tier: str, device: str, unix_s: float) -> AssignmentRecord:
    setting = choice.setting
    return AssignmentRecord(
        tier=tier,
        device=device,
        unix_s=unix_s,
        what=choice.what,
        up=choice.up,
        batch_size=setting.batch_size,
        max_tokens=setting.max_tokens,
        sampling=setting.rung.sampling,
        codec=setting.rung.codec,
        advised=setting.advised,
        why=choice.why,
    )


def fleet(count: int = 200, **about: object) -> list[Device]:
    """So many devices, a fifth of each kind."""
    kinds = list(KINDS.items())
    made = []
    for number in range(count):
        name, kind = kinds[number % len(kinds)]
        made.append(Device(name=f"{name} {number}", kind=kind, **about))  # type: ignore[arg-type]
    return made


ACCURACIES: Final = {"deep": Accuracy(0.86, 4000), "shallow": Accuracy(0.82, 4000)}


def run(
    devices: list[Device], hours: float, *, since_h: float = 0.0
) -> Iterator[tuple[float, Device, Choice]]:
    """Let them live; what was chosen when, in seconds."""
    start, end = (round(one * HOUR_S / REPORT_S) for one in (since_h, hours))
    for step in range(start, end):
        now = step * REPORT_S
        for device in devices:
            if (choice := device.live(now, ACCURACIES)) is not None:
                yield now, device, choice


def value(setting: Setting, what: Quantity) -> object:
    """Of one quantity."""
    return {
        Quantity.BATCH_SIZE: setting.batch_size,
        Quantity.MAX_TOKENS: setting.max_tokens,
        Quantity.RUNG: setting.rung,
        Quantity.TIER: setting.advised,
    }[what]
