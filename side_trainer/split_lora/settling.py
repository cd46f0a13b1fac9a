"""How tiers are settled where a model is split: the trainer has all of it, and knows what each must show."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from side_trainer.journal.records import TierRecord
from side_trainer.settings.tier import TierConfig
from side_trainer.settling import TierSettler, UnsuitableTier
from side_trainer.split_lora.whole_model import WholeModel
from sidestream.contract.errors import BackboneError
from sidestream.contract.messages import Status
from sidestream.contract.plan import Split

_log = logging.getLogger(__name__)


class SplitSettler(TierSettler):
    """See the module. The model is loaded for this once, where there is a tier to settle, and let go of."""

    def look(self, settled: Mapping[str, TierRecord], check: Callable[[], object], *, patient: bool) -> bool:
        """See that every tier's backbone can be cut, before any device comes.

        Raises:
            BackboneError: one cannot, or is not on this machine, or tiers name several.
        """
        config = self.config
        fresh = [name for name in config.tiers if name not in settled]
        if not fresh or patient:
            return False
        references = {tier.head or tier.backbone for tier in config.tiers.values()}
        if len(references) > 1:
            raise BackboneError(
                f"tiers: a split job has one backbone for all tiers, not {', '.join(sorted(references))}"
            )
        method = config.method_plan()
        assert isinstance(method, Split)
        whole = WholeModel(references.pop(), config.task)
        whole.check(method)
        for name in fresh:
            if isinstance(cut := config.tiers[name].cut, int):
                whole.facts(cut, _field(name))
        return False

    def unseen(self, settled: Mapping[str, TierRecord]) -> Iterable[TierRecord]:
        """Every tier with a fixed cut."""
        config = self.config
        fixed = {
            name: tier.cut
            for name, tier in config.tiers.items()
            if name not in settled and isinstance(tier.cut, int)
        }
        if not fixed:
            return
        whole = self._whole()
        for name, cut in fixed.items():
            yield self._record(name, whole, cut)

    def settle(self, name: str, status: Status, settled: Mapping[str, TierRecord]) -> TierRecord | None:
        """By the memory that the tier's first device has free."""
        if self.config.tiers[name].cut != "auto":
            return None
        if not status.memory_bytes:
            _log.warning(
                "%s: auto goes by the memory that a device has free, and one does not tell it; give a number",
                _field(name),
            )
            return None
        try:
            whole = self._whole()
            cut = whole.deepest_cut(status.memory_bytes)
            _log.info(
                "tier %s: cut = %d, for its first device has %d MiB free",
                *(name, cut, status.memory_bytes >> 20),
            )
            return self._record(name, whole, cut)
        except BackboneError as exc:
            raise UnsuitableTier(str(exc)) from exc

    def _whole(self) -> WholeModel:
        tier = next(iter(self.config.tiers.values()))
        return WholeModel(tier.head or tier.backbone, self.config.task)

    def _record(self, name: str, whole: WholeModel, cut: int) -> TierRecord:
        configured: TierConfig = self.config.tiers[name]
        facts = whole.facts(cut, _field(name))
        return TierRecord(
            tier=name,
            align=configured.to_plan().align,
            depth=facts.cut,
            width=facts.width,
            taps=(facts.cut,),
            fingerprint=facts.fingerprint,
            vocabulary=facts.vocabulary,
            whole_depth=facts.whole_depth,
            whole_fingerprint=facts.whole_fingerprint,
            whole_bytes=facts.whole_bytes,
            gradient_codec=configured.gradient_codec,
            backbone=configured.head or configured.backbone,
        )


def _field(tier: str) -> str:
    return f"tiers.{tier}.cut"
