"""What can be chosen for a device: each quantity's values, the least costly first. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from side_trainer.journal.records import AssignmentRecord, Quantity
from side_trainer.settings.tuning import rung_bytes
from sidestream.contract.messages import Assignment
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.sampling import Assignable, Rung

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How one device is to work."""

    batch_size: int
    max_tokens: int
    rung: Rung
    advised: str
    """The tier that it is to be in."""

    @classmethod
    def of_tier(cls, name: str, tier: TierPlan) -> Setting:
        """As the tier's plan has it."""
        return cls(
            batch_size=tier.batch_size,
            max_tokens=tier.max_tokens,
            rung=Rung(sampling=tier.sampling, codec=tier.codec),
            advised=name,
        )

    @classmethod
    def of_record(cls, record: AssignmentRecord) -> Setting:
        """As it was chosen."""
        return cls(
            batch_size=record.batch_size,
            max_tokens=record.max_tokens,
            rung=Rung(sampling=record.sampling, codec=record.codec),
            advised=record.advised or record.tier,
        )

    def assignment(self, *, run: str, version: int, fence: int) -> Assignment:
        """As the device is told."""
        return Assignment(
            run=run,
            version=version,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            sampling=self.rung.sampling,
            codec=self.rung.codec,
            fence=fence,
        )

    def __str__(self) -> str:
        rung = f"{self.rung.sampling} {self.rung.codec.value}"
        return f"batches of {self.batch_size}, {self.max_tokens} tokens, {rung}"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What there is to choose from in one tier."""

    own: Setting
    """What the tier's plan says."""
    plan: TierPlan
    """The tier."""
    bounds: Assignable
    """Its bounds."""
    depths: Mapping[str, int]
    """Of tiers that a device may be advised to move to, with its own."""

    @classmethod
    def of(cls, name: str, plan: Plan, allowed: tuple[str, ...]) -> Choices | None:
        """Of a tier; None where nothing may be assigned.

        Args:
            name: The tier's.
            plan: The job's.
            allowed: Tiers that may be advised; empty for those with the same backbone.
        """
        tier = plan.tiers[name]
        if tier.assignable is None or not plan.ready_for(name):
            return None
        depths = {
            other: known.depth
            for other, known in plan.tiers.items()
            if known.settled
            and (known.align, known.width) == (tier.align, tier.width)
            and (other == name or other in allowed or (not allowed and known.backbone == tier.backbone))
        }
        return cls(own=Setting.of_tier(name, tier), plan=tier, bounds=tier.assignable, depths=depths)

    def fitted(self, setting: Setting) -> Setting:
        """The same within the bounds: the nearest values, and the tier's own where none is near."""
        bounds = self.bounds
        return Setting(
            batch_size=min(max(setting.batch_size, bounds.batch_size_min), bounds.batch_size_max),
            max_tokens=min(max(setting.max_tokens, bounds.max_tokens_min), bounds.max_tokens_max),
            rung=setting.rung if setting.rung in bounds.rungs else self.own.rung,
            advised=setting.advised if setting.advised in self.depths else self.own.advised,
        )

    def step(self, setting: Setting, what: Quantity, *, up: bool) -> Setting | None:
        """The next setting that costs the device more, or less, of one quantity; None at the end."""
        bounds, own = self.bounds, self.own
        if what is Quantity.BATCH_SIZE:
            sizes = _halvings(own.batch_size, bounds.batch_size_min, bounds.batch_size_max)
            size = _next(sizes, setting.batch_size, up)
            return None if size is None else replace(setting, batch_size=size)
        if what is Quantity.MAX_TOKENS:
            limits = _halvings(own.max_tokens, bounds.max_tokens_min, bounds.max_tokens_max)
            limit = _next(limits, setting.max_tokens, up)
            return None if limit is None else replace(setting, max_tokens=limit)
        if what is Quantity.RUNG:
            place = bounds.rungs.index(setting.rung) + (-1 if up else 1)
            return replace(setting, rung=bounds.rungs[place]) if 0 <= place < len(bounds.rungs) else None
        assert what is Quantity.TIER
        return self._advised(setting, up)

    def _advised(self, setting: Setting, up: bool) -> Setting | None:
        """The next tier, at most one from the device's own: what it measures, it measures there."""
        ordered = sorted(self.depths, key=lambda name: (self.depths[name], name == self.own.advised, name))
        ordered = [
            name for name in ordered
            if name == self.own.advised or self.depths[name] != self.depths[self.own.advised]
        ]  # fmt: skip
        here, place = ordered.index(self.own.advised), ordered.index(setting.advised)
        place += 1 if up else -1
        if not (0 <= place < len(ordered) and abs(place - here) <= 1):
            return None
        return replace(setting, advised=ordered[place])

    def bytes_of(self, setting: Setting) -> int:
        """What a sample at its token limit takes."""
        return rung_bytes(setting.rung, setting.max_tokens, self.plan)

    def depth_of(self, setting: Setting) -> int:
        """Layers of the tier that is advised."""
        return self.depths[setting.advised]


def _halvings(own: int, least: int, most: int) -> list[int]:
    """Values from the least to the most, each about twice the one before; the tier's own is one of them."""
    found, value = {own, least, most}, own
    while (value := value // 2) > least:
        found.add(value)
    value = own
    while (value := value * 2) < most:
        found.add(value)
    return sorted(found)


def _next(values: list[int], value: int, up: bool) -> int | None:
    """The neighbour of a value that may lie between two of them."""
    place = (
        bisect_right(values, value) if up else values.index(next(one for one in values if one >= value)) - 1
    )
    return values[place] if 0 <= place < len(values) else None
