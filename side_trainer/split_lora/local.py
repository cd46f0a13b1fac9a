"""Adapters that devices keep to themselves, the paper's form: uploaded at a round's end, and averaged.

An average weighs every device by the samples of its steps. Layers above a device's cut are the trainer's: one
set for all, which stands in for what a device does not hold, or a set for each device, which is averaged with
what the device holds. So the second is FedAvg with LoRA, computed in two places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from side_trainer.split_lora.optimiser import Optimiser, moment_arrays, read_moments
from sidestream.contract.plan import RoundPlan
from sidestream.contract.tensors import Floats

_OWN: Final = "own"
_FASTEST: Final = 4.0  # times the learning rate: no step of AdamW is longer
_OTHERS: Final = 10.0
_ROUNDING: Final = 0.03  # of the weights: devices began with what travels in int8
_Moments = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One device's adapters in a round."""

    offset: int
    """The record."""
    device: str
    """Whose they are."""
    samples: int
    """Of its steps."""
    tensors: Mapping[str, Floats]
    """Below its cut, by name."""


class OwnUppers:
    """What is above the cut, a set for each device: swapped in while its batch is served.

    Args:
        parameters: Of the model, by name.
        optimiser: Of them; each device's moments go with its set, and begin anew after an averaging.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimiser: Optimiser) -> None:
        self._parameters = parameters
        self._optimiser = optimiser
        self._sets: dict[str, tuple[dict[str, torch.Tensor], _Moments]] = {}

    def swap_in(self, device: str) -> dict[str, torch.Tensor]:
        """Have the model compute with a device's set; return what was there."""
        common = {name: one.data for name, one in self._parameters.items()}
        own, moments = self._sets.get(device) or ({name: one.clone() for name, one in common.items()}, {})
        for name, one in self._parameters.items():
            one.data = own[name]
        self._optimiser.take(self._parameters)
        self._optimiser.put(moments)
        return common

    def swap_out(self, device: str, common: Mapping[str, torch.Tensor]) -> None:
        """Keep the device's set, and put back what was there."""
        own = {name: one.data for name, one in self._parameters.items()}
        self._sets[device] = own, self._optimiser.take(self._parameters)
        for name, one in self._parameters.items():
            one.data = common[name]

    def of(self, device: str) -> Mapping[str, Floats]:
        """A device's set; the common one if it has none."""
        own = self._sets.get(device)
        found = own[0] if own is not None else {name: one.data for name, one in self._parameters.items()}
        return {name: one.numpy() for name, one in found.items()}

    def clear(self) -> None:
        """They have been averaged."""
        self._sets.clear()

    def arrays(self) -> dict[str, Floats]:
        """For a checkpoint: ``own/<device>/…``."""
        found: dict[str, Floats] = {}
        for device, (own, moments) in self._sets.items():
            below = {f"weights/{name}": one.numpy() for name, one in own.items()} | moment_arrays(moments)
            found |= {f"{_OWN}/{device}/{name}": np.array(array) for name, array in below.items()}
        return found

    def restore(self, arrays: Mapping[str, Floats]) -> None:
        """Return to what :meth:`arrays` gave."""
        by_device: dict[str, dict[str, Floats]] = {}
        for name, array in arrays.items():
            if name.startswith(f"{_OWN}/"):
                _, device, rest = name.split("/", 2)
                by_device.setdefault(device, {})[rest] = array
        shapes = {name: tuple(one.shape) for name, one in self._parameters.items()}
        for device, below in by_device.items():
            own = {name: torch.tensor(below[f"weights/{name}"]) for name in self._parameters}
            self._sets[device] = own, read_moments(below, shapes)


def too_far(
    uploads: Sequence[Upload], common: Mapping[str, Floats], plan: RoundPlan, trainer_travel: float
) -> dict[str, str]:
    """Devices whose adapters lie where no steps of a round lead, with why in words.

    AdamW moves a value by the learning rate or less a step, and never by more than some three times that.
    Beside this, an upload lies no more than ten times as far off as the lower half of them.

    Args:
        uploads: Of the round.
        common: The trainer's set, near which the round began.
        plan: Says what steps are made.
        trainer_travel: How far a value of the trainer's set may have moved meanwhile, at its own rate.
    """
    found = {one.device: _distance(one.tensors, common) for one in uploads}
    usual = plan.learning_rate * plan.batches * (1 + plan.weight_decay)
    nearby = sorted(distance for distance, _ in found.values())[(len(found) - 1) // 2]
    refused = {}
    for device, (distance, size) in found.items():
        slack = _ROUNDING * size
        most = min(_FASTEST * (usual + trainer_travel), max(_OTHERS * nearby, usual))
        if not distance <= most + slack:
            refused[device] = f"its adapters moved by {distance:.3g} in the mean; {most:.3g} is the most"
    return refused


def _distance(tensors: Mapping[str, Floats], common: Mapping[str, Floats]) -> tuple[float, float]:
    """How far adapters lie from the trainer's, and how large those are: root mean squares."""
    moved = np.concatenate([(one.astype(np.float64) - common[name]).ravel() for name, one in tensors.items()])
    size = np.concatenate([common[name].astype(np.float64).ravel() for name in tensors])
    return float(np.sqrt(np.square(moved).mean())), float(np.sqrt(np.square(size).mean()))


def averaged(
    uploads: list[Upload], common: Mapping[str, Floats], uppers: OwnUppers | None
) -> dict[str, Floats]:
    """The weighted mean of devices' adapters.

    Args:
        uploads: Of the round.
        common: The trainer's set.
        uppers: The devices' sets above their cuts, where each has one.
    """
    total = sum(one.samples for one in uploads)
    sums: dict[str, Any] = {}
    for one in uploads:
        above = uppers.of(one.device) if uppers is not None else common
        for name, shared in common.items():
            part = one.tensors.get(name, above[name]).astype(np.float64)
            sums[name] = sums.get(name, np.zeros(shared.shape)) + one.samples * part
    return {name: (value / total).astype(np.float32) for name, value in sums.items()}
