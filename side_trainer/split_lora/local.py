"""Adapters that devices keep to themselves, the paper's form: uploaded at a round's end, and averaged.

An average weighs every device by the samples of its steps. Layers above a device's cut are the trainer's: one
set for all, which stands in for what a device does not hold, or a set for each device, which is averaged with
what the device holds. So the second is FedAvg with LoRA, computed in two places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from side_trainer.split_lora.optimiser import Optimiser, moment_arrays, read_moments
from sidestream.contract.tensors import Floats

_OWN: Final = "own"
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
