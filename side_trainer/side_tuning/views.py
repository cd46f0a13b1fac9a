"""Views: rows that look alike to the side-network, whichever tier sent them. Pure.

What a row shows at b taps is its first b tapped layers through its alignment map. Where taps are nested, a
deep tier's rows show there what a shallow tier's do, and teach the same answer. What such an answer is
adjusted by are then the labels of all the rows that teach it, not those of one tier: with all tiers together
that is nothing, however skewed each is.

How far an answer is to be *trusted* is exp(−D⁴), with D the divergence of the fleet's labels from those that
teach it: 1 where they are alike, also with mild skew, near 0 where a label is all but missing. A tier whose
own, deepest answer is to be trusted less than one on the way to it keeps to that one, its anchor, by as much.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from side_trainer.side_tuning.objectives import Counts, Objective

_POWER: Final = 4


class Tapped(NamedTuple):
    """What decides a tier's views."""

    align: str
    """Its alignment map."""
    taps: tuple[int, ...]
    """The layers that it taps."""


class Anchor(NamedTuple):
    """What a tier's own answer is held to."""

    taps: int
    """The answer at so many taps; the tier's own if it is trusted most."""
    share: float
    """How much the own answer still learns from labels: its trust as a share of the anchor's, at most 1."""


class Views:
    """Label statistics by view.

    Args:
        tiers: All of the job's.
        counts: Statistics of the labels of each tier's rows.
        objective: What to make of them.
        weight: What a row counts for at a view that is not its own last one.
    """

    def __init__(
        self,
        tiers: Mapping[str, Tapped],
        counts: Mapping[str, Counts],
        objective: Objective,
        weight: float,
    ) -> None:
        self._tiers = tiers
        self._counts = counts
        self._objective = objective
        self._weight = weight

    def counts(self, tier: str, taps: int) -> Counts:
        """Statistics of the labels of all rows that look at ``taps`` taps as this tier's do."""
        align, layers = self._tiers[tier]
        seen = (
            (1.0 if len(other.taps) == taps else self._weight) * self._counts[name]
            for name, other in self._tiers.items()
            if other.align == align and len(other.taps) >= taps and other.taps[:taps] == layers[:taps]
        )
        return sum(seen, np.zeros_like(self._counts[tier]))

    def adjustment(self, tier: str, taps: int, fleet: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """[C]: the label prior of such rows, less the fleet's."""
        return self._objective.prior(self.counts(tier, taps)) - fleet

    def anchor(self, tier: str, exits: Collection[int], all_counts: Counts) -> Anchor:
        """What the tier's own answer is held to, of the answers at ``exits`` taps; the deepest of equals."""
        own = len(self._tiers[tier].taps)
        trusts = {
            taps: trust(self._objective.divergence(all_counts, counts))
            for taps in {*exits, own}
            if taps <= own and (counts := self.counts(tier, taps)).any()
        }
        if own not in trusts:
            return Anchor(own, 1.0)
        best = max(trusts, key=lambda taps: (trusts[taps], taps))
        return Anchor(best, trusts[own] / trusts[best])


def trust(divergence: float) -> float:
    """How far an answer is to be trusted whose rows' labels differ so much from the fleet's, in nats."""
    return float(np.exp(-(max(0.0, divergence) ** _POWER)))
