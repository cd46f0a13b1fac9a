"""What rows' losses were in a record's updates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from side_trainer.rows.training_rows import MiniBatch


class Losses:
    """Rows' losses over some updates, by tier."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def add(self, batch: MiniBatch | None, shown: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Take in an update's [K], if it had rows; return them."""
        if batch is None:
            return shown
        for tier, loss in zip(batch.tiers, shown.tolist(), strict=True):
            self._found.setdefault(tier, []).append(loss)
        return shown

    @property
    def by_tier(self) -> dict[str, float]:
        """Means."""
        return {tier: float(np.mean(losses)) for tier, losses in sorted(self._found.items())}


def served_of(batch: MiniBatch, shown: npt.NDArray[np.float32]) -> tuple[tuple[str, str, float], ...]:
    """Of each batch that rows came in, its tier, its stream, and the mean of its rows' losses, of [K]."""
    return tuple(
        (one.tier, one.stream, float(shown[[of is one for of in batch.batches]].mean()))
        for one in dict.fromkeys(batch.batches)
    )
