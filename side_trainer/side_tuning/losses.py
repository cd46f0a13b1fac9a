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
