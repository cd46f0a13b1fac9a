"""AdamW over named parameters, of which each step moves some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from side_trainer.settings.schema import LearnerSettings
from sidestream.contract.tensors import Floats

_Moments = dict[str, torch.Tensor]


class Optimiser:
    """Steps those parameters that have a gradient; each counts its own steps.

    Args:
        parameters: By name.
        settings: Rates.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: LearnerSettings) -> None:
        self._parameters = parameters
        matrices = [one for one in parameters.values() if one.dim() > 1]
        vectors = [one for one in parameters.values() if one.dim() <= 1]
        groups = [{"params": matrices, "decays": True}, {"params": vectors, "decays": False}]
        self._adamw = torch.optim.AdamW([group for group in groups if group["params"]])
        self.configure(settings)

    def configure(self, settings: LearnerSettings) -> None:
        """Go on with other settings."""
        self._settings = settings
        for group in self._adamw.param_groups:
            group["weight_decay"] = settings.weight_decay if group["decays"] else 0.0

    def forget_gradients(self) -> None:
        """Nothing moves at the next step but what gets a gradient until then."""
        self._adamw.zero_grad(set_to_none=True)

    def step(self, rate: float) -> float:
        """Move what has a gradient, at a share of the learning rate; return the gradient's norm.

        One whose gradient is no number is left out.
        """
        moved = [one for one in self._parameters.values() if one.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(moved, self._settings.clip_norm)
        for group in self._adamw.param_groups:
            group["lr"] = self._settings.learning_rate * rate
        if torch.isfinite(norm):
            self._adamw.step()
        self.forget_gradients()
        return float(norm)

    def take(self, names: Iterable[str]) -> dict[str, _Moments]:
        """Take some parameters' moments out; without them they begin anew."""
        return {name: self._adamw.state.pop(self._parameters[name], {}) for name in names}

    def put(self, moments: Mapping[str, _Moments]) -> None:
        """Put back what was taken."""
        for name, one in moments.items():
            self._adamw.state.pop(self._parameters[name], None)
            if one:
                self._adamw.state[self._parameters[name]] = one

    def arrays(self) -> dict[str, Floats]:
        """AdamW's moments, as ``<moment>/<parameter>``."""
        return moment_arrays({name: self._adamw.state.get(one, {}) for name, one in self._parameters.items()})

    def restore(self, arrays: Mapping[str, Floats]) -> None:
        """Return to moments that :meth:`arrays` gave."""
        shapes = {name: tuple(one.shape) for name, one in self._parameters.items()}
        self.put(read_moments(arrays, shapes))


def moment_arrays(moments: Mapping[str, _Moments]) -> dict[str, Floats]:
    """As ``<moment>/<parameter>``."""
    return {
        f"{key}/{name}": np.atleast_1d(value.numpy()).astype(np.float32)
        for name, one in moments.items()
        for key, value in one.items()
    }


def read_moments(arrays: Mapping[str, Floats], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Moments]:
    """The inverse of :func:`moment_arrays`, for parameters of these shapes."""
    found: dict[str, _Moments] = {name: {} for name in shapes}
    for name, shape in shapes.items():
        if f"step/{name}" in arrays:
            found[name] = {
                "step": torch.tensor(float(arrays[f"step/{name}"][0])),
                "exp_avg": torch.tensor(arrays[f"exp_avg/{name}"]).reshape(shape),
                "exp_avg_sq": torch.tensor(arrays[f"exp_avg_sq/{name}"]).reshape(shape),
            }
    return found
