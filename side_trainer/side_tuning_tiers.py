"""How tiers are settled where a side-network is learnt: by what their first devices show."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from side_trainer.journal.journal import Journal
from side_trainer.journal.records import TierRecord
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settling import TierSettler, UnsuitableTier
from side_trainer.side_tuning.output_heads import HeadFacts, Heads
from sidestream.contract.errors import BackboneError, WireError
from sidestream.contract.messages import Status
from sidestream.contract.plan import TierPlan, joining_taps
from sidestream.contract.tasks import TASKS

LOOK_EVERY_S: Final = 15.0
_log = logging.getLogger(__name__)


class SideTuningSettler(TierSettler):
    """See the module. A language model's tiers wait for their output heads as well.

    Args:
        config: The operator's settings.
        journal: Has heads beside it.
    """

    def __init__(self, config: TrainerConfig, journal: Journal) -> None:
        super().__init__(config, journal)
        self._heads: dict[str, HeadFacts] = {}

    def look(self, settled: Mapping[str, TierRecord], check: Callable[[], object], *, patient: bool) -> bool:
        """Find the output heads of tiers that have none yet; a settled tier's is in the journal's folder."""
        config, before = self.config, len(self._heads)
        if not TASKS[config.task].generates:
            return False
        heads = Heads(self.journal.folder)
        for name, tier in config.tiers.items():
            if name in settled or name in self._heads:
                continue
            try:
                self._heads[name] = heads.take(tier.head or tier.backbone)
                check()
            except (BackboneError, WireError) as exc:
                self._heads.pop(name, None)
                if not patient:
                    raise
                _log.error(
                    "tier %s waits: its output head cannot be read: %s; looking again in %.0f s",
                    *(name, exc, LOOK_EVERY_S),
                )
        return len(self._heads) > before

    def shown(self, name: str, plan: TierPlan) -> TierPlan:
        if (head := self._heads.get(name)) is None:
            return plan
        return msgspec.structs.replace(plan, head=head.fingerprint, vocabulary=head.vocabulary)

    def settle(self, name: str, status: Status, settled: Mapping[str, TierRecord]) -> TierRecord | None:
        """Fix a tier's depth, width, taps and fingerprint."""
        if not (status.fingerprint and status.depth):
            return None
        configured = self.config.tiers[name]
        record = TierRecord(
            tier=name,
            align=configured.to_plan().align,
            depth=status.depth,
            width=status.width,
            taps=self._taps(name, status.depth, settled),
            fingerprint=status.fingerprint,
            backbone=configured.head or configured.backbone,
        )
        head = self._heads.get(name)
        if head is None:
            return None if TASKS[self.config.task].generates else record
        if head.width != status.width:
            raise UnsuitableTier(f"its head takes width {head.width}, the backbone has {status.width}")
        if record.taps[-1] != status.depth:
            raise UnsuitableTier(f"taps must end with the backbone's last layer, {status.depth}")
        return msgspec.structs.replace(record, head=head.fingerprint, vocabulary=head.vocabulary)

    def _taps(self, name: str, depth: int, settled: Mapping[str, TierRecord]) -> tuple[int, ...]:
        """As configured, unless tiers of the family were settled when fewer were known; then as they are.

        A shallower tier that joins later may not move the layers that the others already tap.
        """
        config = self.config
        taps, align = config.taps_of(name, depth), config.tiers[name].to_plan().align
        family = [one for one in settled.values() if one.align == align and one.tier in config.tiers]
        if config.tiers[name].taps or all(config.taps_of(one.tier, one.depth) == one.taps for one in family):
            return taps
        fullest = max(family, key=lambda one: (len(one.taps), one.tier))
        return joining_taps(depth, config.side_network.blocks, fullest.taps)
