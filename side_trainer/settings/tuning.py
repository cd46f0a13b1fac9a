"""Within what bounds the trainer chooses for single devices: the table ``[tuning]``, used with ``autotune``.

What may be assigned stands in the plan, so that devices hold assignments against it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Protocol

import msgspec

from sidestream.contract.errors import ConfigError
from sidestream.contract.plan import METHODS, Split, TierPlan
from sidestream.contract.sampling import Assignable, Rung, parse_sampling
from sidestream.contract.tasks import TASKS, Modality, Task
from sidestream.contract.tensors import encoded_sizes
from sidestream.contract.wire import prepared

_WIDTH = 384  # of a tier that is not settled: which way to send is the richer one does not hang on it
_TAPS = 3
_Hours = Annotated[float, msgspec.Meta(gt=0, le=10_000)]


@prepared
class TuningConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Within what bounds the trainer chooses for single devices; the table ``[tuning]``."""

    batch_size_min: Annotated[int, msgspec.Meta(ge=1, le=256)] = 4
    """Fewest samples a message, or what the tier has where that is less."""
    batch_size_max: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    """Most samples a message; 0: what the tier has. Larger batches are fewer updates."""
    max_tokens_min: Annotated[int, msgspec.Meta(ge=4, le=4096)] = 32
    """The lowest limit at which longer samples are cut, or what the tier has where that is less."""
    max_tokens_max: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    """The highest; 0: what the tier has. Where every token has an answer, and for images, that stays."""
    richer: bool = False
    """Whether a device may send more than its tier's sampling and codec do, up to the top of the ladder."""
    tiers: tuple[str, ...] = ()
    """Tiers that a device may be advised to move to; default: those that have the same backbone."""
    memory_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    """An agent is to take at most this share of the memory that it has and that is free."""
    temperature_celsius: Annotated[float, msgspec.Meta(gt=25, le=150)] = 75.0
    """The board is to be no hotter, nine tenths of the time."""
    link_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    """Something is to be on its way to the trainer for at most this share of the time."""
    batch_seconds: Annotated[float, msgspec.Meta(gt=0)] = 20.0
    """The forward pass of a batch is to take no longer."""
    accuracy_gain: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.02
    """By so much a deeper tier's accuracy has to lie above a device's own for a move to be advised."""
    margin: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.25
    """What costs a device more is chosen only if its loads would then stay this far below these limits; twice
    as far where it takes back what was chosen before."""
    window_h: _Hours = 1.0
    """Hours of telemetry that a device is judged by: two such windows in a row to ease it, six to ask for
    more."""
    dwell_h: _Hours = 6.0
    """Hours until a quantity that was changed is raised; twice as many to take back what was raised."""
    reverse_h: _Hours = 24.0
    """Hours until a quantity that was lowered is raised again, doubled with every such turn."""
    changes_a_day: Annotated[int, msgspec.Meta(ge=1, le=100)] = 4
    """Most choices for one device in 24 hours."""


class Tuned(Protocol):
    """What of the trainer's settings goes with choosing."""

    @property
    def task(self) -> Task: ...

    @property
    def method(self) -> str: ...

    @property
    def autotune(self) -> bool: ...

    @property
    def tuning(self) -> TuningConfig: ...

    @property
    def tiers(self) -> Mapping[str, object]: ...

    def tier_plan(self, name: str) -> TierPlan: ...


def assignable(plan: TierPlan, task: Task, tuning: TuningConfig) -> Assignable:
    """What may be assigned to devices of a tier."""
    own = Rung(sampling=plan.sampling, codec=plan.codec)
    taken = {rung: rung_bytes(rung, plan.max_tokens, plan) for rung in (own, *plan.rungs(task))}
    most = max(taken.values()) if tuning.richer else taken[own]
    spec = TASKS[task]
    cut = spec.modality is Modality.TEXT and not spec.per_vector
    tokens = plan.max_tokens
    return Assignable(
        batch_size_min=min(tuning.batch_size_min, plan.batch_size),
        batch_size_max=tuning.batch_size_max or plan.batch_size,
        max_tokens_min=min(tuning.max_tokens_min, tokens) if cut else tokens,
        max_tokens_max=tuning.max_tokens_max or tokens if cut else tokens,
        rungs=tuple(sorted((rung for rung in taken if taken[rung] <= most), key=lambda rung: -taken[rung])),
    )


def rung_bytes(rung: Rung, tokens: int, plan: TierPlan) -> int:
    """What a sample of so many tokens takes by a way to send, its arrays alone."""
    vectors = parse_sampling(rung.sampling).most_tokens(tokens)
    shape = (len(plan.taps) or _TAPS, vectors, plan.width or _WIDTH)
    return sum(encoded_sizes(rung.codec, shape))


def check_tuning(config: Tuned) -> None:
    """Refuse bounds that nothing can be chosen within.

    Raises:
        ConfigError: naming the field.
    """
    tuning = config.tuning
    if config.autotune and issubclass(METHODS[config.method], Split):
        raise ConfigError("autotune", f"{config.method} has nothing that it could choose; leave it out")
    for name in tuning.tiers:
        if name not in config.tiers:
            raise ConfigError("tuning.tiers", f"{name[:80]!r} is no tier of the job")
    for name in config.tiers if config.autotune else ():
        plan = config.tier_plan(name)
        for field, own in (("batch_size", plan.batch_size), ("max_tokens", plan.max_tokens)):
            most = getattr(tuning, f"{field}_max")
            if most and most < own:
                raise ConfigError(f"tuning.{field}_max", f"{most} is below tiers.{name}.{field} = {own}")
