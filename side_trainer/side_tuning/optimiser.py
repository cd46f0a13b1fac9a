"""AdamW over a side-network that may grow, and the running mean of what comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from side_trainer.settings.schema import LearnerSettings
from sidestream.accelerator.torch_device import HERE, Placement
from sidestream.contract.tensors import Floats
from sidestream.side_network.network import SideNetwork


class Optimiser:
    """Updates a network and its average.

    Args:
        network: What is trained.
        average: The running mean of the network over updates (Polyak averaging); as the network at first.
        settings: Rates.
        place: Where both are.
    """

    def __init__(
        self, network: SideNetwork, average: SideNetwork, settings: LearnerSettings, place: Placement = HERE
    ) -> None:
        self._network = network
        self._average = average
        self._settings = settings
        self._place = place
        fused = place.device.type in ("cpu", "cuda")
        self._adamw = torch.optim.AdamW(self._groups_beside([]), fused=fused)
        self.configure(settings)

    def configure(self, settings: LearnerSettings) -> None:
        """Go on with other settings."""
        self._settings = settings
        self._network.dropout = settings.dropout
        for group in self._adamw.param_groups:
            group["weight_decay"] = settings.weight_decay if group["decays"] else 0.0

    def extend(self) -> None:
        """Take up the parameters that the network has got since."""
        for group in self._groups_beside(self._adamw.param_groups):
            self._adamw.add_param_group(group)
        self.configure(self._settings)

    def step(
        self,
        loss: torch.Tensor | None,
        *,
        updates: int,
        rate: float,
        meet: Callable[[Sequence[torch.nn.Parameter]], None] | None = None,
    ) -> None:
        """Make update number ``updates``, at a share of the learning rate.

        One whose gradient is no number is left out: it would leave nothing but that, for ever.

        Args:
            loss: None where there is nothing to learn from here.
            updates: Counted from 1.
            rate: That share.
            meet: Told the parameters, by name, once they have gradients: it may put others in their places.
        """
        settings = self._settings
        warmup = min(1.0, updates / max(1, settings.warmup_updates))
        for group in self._adamw.param_groups:
            group["lr"] = settings.learning_rate * rate * warmup
        self._adamw.zero_grad(set_to_none=True)
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        parameters = list(self._network.parameters())
        if meet is not None:
            parameters = [one for _, one in sorted(self._network.named_parameters())]
            meet(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        if self._place.fetch(torch.isfinite(norm)):
            self._adamw.step()
            self._move_average(updates)

    def _move_average(self, updates: int) -> None:
        """Short memory at first, the last hundred or so updates later."""
        memory = min(self._settings.averaging, (1 + updates) / (10 + updates))
        with torch.no_grad():
            means, parameters = tuple(self._average.parameters()), tuple(self._network.parameters())
            torch._foreach_lerp_(means, parameters, 1 - memory)

    def _groups_beside(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameters that are in none of these; matrices decay, biases, gates and norms do not."""
        known = {id(parameter) for group in groups for parameter in group["params"]}
        split: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for name, parameter in self._network.named_parameters():
            if id(parameter) not in known:
                split[name.endswith("weight") and parameter.dim() > 1].append(parameter)
        return [
            {"params": parameters, "decays": decays} for decays, parameters in split.items() if parameters
        ]

    # --- state ---------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, Floats]:
        """AdamW's moments, as ``<moment>/<parameter>``."""
        states: dict[torch.Tensor, dict[str, torch.Tensor]] = self._adamw.state
        return {
            f"{key}/{name}": np.atleast_1d(self._place.fetch(value).numpy()).astype(np.float32)
            for name, parameter in self._network.named_parameters()
            for key, value in states.get(parameter, {}).items()
        }

    def restore(self, arrays: Mapping[str, Floats]) -> None:
        """Return to moments that :meth:`arrays` gave."""
        send = self._place.send
        self._adamw.state.clear()
        for name, parameter in self._network.named_parameters():
            if f"step/{name}" in arrays:
                self._adamw.state[parameter] = {
                    "step": send(torch.tensor(float(arrays[f"step/{name}"][0]))),
                    "exp_avg": send(torch.from_numpy(arrays[f"exp_avg/{name}"]).reshape(parameter.shape)),
                    "exp_avg_sq": send(
                        torch.from_numpy(arrays[f"exp_avg_sq/{name}"]).reshape(parameter.shape)
                    ),
                }


def half_cosine(progress: float, final: float) -> float:
    """1 at progress 0, ``final`` at progress 1."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
