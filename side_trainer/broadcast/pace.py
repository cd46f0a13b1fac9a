"""When a version that is not final is worth its bytes: devices have paid for it, and would be better off.

Paid: since the last version, devices have sent so much that this one, to all of them, is no more than a
share of it. Better off: on the rows that came last, which the running mean has hardly seen, its loss lies
below that of what devices have by a share; before the first version that is untrained weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from side_trainer.fold.fold import Fold
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.tensors import Floats

_GROWTH: Final = 1.05  # of the samples, until what was judged not to be worth it is judged anew


class Pace:
    """Belongs to the learner's thread.

    Args:
        fold: Has the weights.
        online: How many devices are online, by tier.
    """

    def __init__(self, fold: Fold, online: Callable[[], Mapping[str, int]]) -> None:
        self._fold = fold
        self._online = online
        self._heard_bytes = 0
        self._sizes: Mapping[str, int] = {}
        self._judged = 0

    def heard(self, size: int) -> None:
        """A device's message of so many bytes was folded."""
        self._heard_bytes += size

    def published(self) -> None:
        """A version has gone out: what was sent before is spent."""
        self._heard_bytes = self._judged = 0

    def is_worth(
        self, config: TrainerConfig, before: Mapping[str, Floats], now: Mapping[str, Floats]
    ) -> bool:
        """Whether devices are to get ``now``, having ``before``; empty if they have nothing."""
        method, share = self._fold.method, config.publish_share
        if self._fold.samples < _GROWTH * self._judged or not self._may_be_paid(share):
            return False
        if before.keys() == now.keys() and method.moved_by(before, now) < config.publish_change:
            return False
        if not self._is_paid(config):
            return False
        if not config.publish_gain:
            return True
        self._judged = self._fold.samples
        gain = method.gain(before)
        return gain is None or gain >= config.publish_gain

    def _may_be_paid(self, share: float) -> bool:
        """By what a version took when it was last asked."""
        unknown = self._sizes.keys() != self._fold.facts.tiers.keys()
        return not share or unknown or self._covers(share)

    def _is_paid(self, config: TrainerConfig) -> bool:
        """By what one takes now: weights that have learnt more are packed less well."""
        if not config.publish_share:
            return True
        bundles = self._fold.method.bundles("0" * 32, 0, config.weights_codec)
        self._sizes = {tier: len(bundle) for tier, bundle in bundles.items()}
        return self._covers(config.publish_share)

    def _covers(self, share: float) -> bool:
        online = self._online()
        cost = sum(size * max(1, online.get(tier, 0)) for tier, size in self._sizes.items())
        return share * self._heard_bytes >= cost
