"""Who takes part in a simulated fleet: devices with a tier, a share of the data and a speed; churn. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.workload import Workload
from sidestream.contract.plan import Precision
from sidestream.demo.shards import Example, deal

_DEPTH_OF_ALL = 6  # stands for a whole backbone's layers where only their ratio to others matters
_FAST = 10.0


@dataclass(frozen=True, kw_only=True)
class FleetDevice:
    """One device."""

    name: str
    """Its id."""
    tier: str
    """Its tier."""
    examples: Sequence[Example]
    """Its data; none for a device that only receives."""
    speed: float = 1.0
    """Samples it forwards per unit of simulated time."""
    leaves: bool = False
    """It stops for good half-way through its data."""
    joins_after: str = ""
    """It starts when this device leaves; empty: at the beginning."""
    on_device: tuple[str, Precision] | None = None
    """Where it loads the backbone from, and in what; None: as the plan says."""
    windows: int = 0
    """Of a language model: pieces that its data goes through the backbone in; 0: every example is one."""

    @property
    def rows(self) -> int:
        """What goes through its backbone."""
        return self.windows or len(self.examples)


def make_fleet(work: Workload, *, devices: int, alpha: float, seed: int, churn: bool) -> list[FleetDevice]:
    """Deal the data to devices, which belong to the tiers in turn; speed falls with the layers they run."""
    shards = deal(work.train, devices, alpha=alpha, seed=seed)
    tiers = list(work.tiers)
    fleet = []
    for index, shard in enumerate(shards):
        tier = tiers[index % len(tiers)]
        speed = 1 / (work.tiers[tier] or max(_DEPTH_OF_ALL, *work.tiers.values()))
        fleet.append(
            FleetDevice(
                name=f"{tier}-{index // len(tiers) + 1:02d}",
                tier=tier,
                examples=shard,
                speed=speed,
                on_device=work.on_device.get(tier),
            )
        )
    return _with_churn(fleet, seed) if churn else fleet


def _with_churn(fleet: list[FleetDevice], seed: int) -> list[FleetDevice]:
    """A third leaves half-way, a third joins as those leave, one that stays is ten times as fast."""
    order = np.random.default_rng([seed, 7]).permutation(len(fleet)).tolist()
    third = len(fleet) // 3
    leavers, joiners = order[:third], order[third : 2 * third]
    changed = list(fleet)
    for leaver, joiner in zip(leavers, joiners, strict=True):
        changed[leaver] = replace(fleet[leaver], leaves=True)
        changed[joiner] = replace(fleet[joiner], joins_after=fleet[leaver].name)
    fast = order[2 * third]
    changed[fast] = replace(fleet[fast], speed=fleet[fast].speed * _FAST)
    return changed
