"""A device's own steps on its adapters, where these are averaged in rounds and not held by the trainer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sidestream.contract.plan import RoundPlan
from sidestream.contract.tensors import Floats
from sidestream.split_model.lower_half import LowerHalf


class LocalSteps:
    """AdamW on a lower half's adapters; it begins anew with every round, as the adapters do.

    Args:
        lower: Whose.
        plan: Rates.
    """

    def __init__(self, lower: LowerHalf, plan: RoundPlan) -> None:
        self._lower = lower
        self._plan = plan
        self.begin()

    def begin(self) -> None:
        """A round begins: the adapters are others, and no moments are left."""
        self._values = {name: torch.from_numpy(array) for name, array in self._lower.arrays().items()}
        self._adamw = torch.optim.AdamW(
            list(self._values.values()), lr=self._plan.learning_rate, weight_decay=self._plan.weight_decay
        )

    def step(self, gradients: Mapping[str, Floats], rate: float) -> None:
        """Move the adapters by a gradient, at a share of the learning rate."""
        for name, value in self._values.items():
            value.grad = torch.from_numpy(gradients[name])
        norm = torch.nn.utils.clip_grad_norm_(list(self._values.values()), self._plan.clip_norm)
        for group in self._adamw.param_groups:
            group["lr"] = self._plan.learning_rate * rate
        if torch.isfinite(norm):
            self._adamw.step()
        self._lower.load({name: value.numpy() for name, value in self._values.items()})
