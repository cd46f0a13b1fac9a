"""Split training is LoRA's own: the weights of a model that was never cut, on one device and on several.

The references train the whole model, by peft alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sidestream.backbone.text_input import Tokens
from sidestream.contract.tensors import Floats
from sidestream.split_model.lower_half import LowerHalf
from sidestream.split_model.split_model import SplitModel
from tests.split_model.halves import (
    LABELS,
    backbone,
    loss_of,
    lower_half,
    lower_part,
    model_of,
    some_targets,
    spec,
    split_model,
    tokens_of,
)

RATE: Final = 1e-2
STEPS: Final = 50
CLOSE: Final = 1e-6
Weights = dict[str, Floats]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks


class Reference:
    """LoRA on a model of transformers, by peft, with a linear head over the mean or its own head."""

    def __init__(self, kind: str, start: Weights, *, lm: bool) -> None:
        wanted = spec(kind)
        config = peft.LoraConfig(r=wanted.rank, lora_alpha=wanted.alpha, fan_in_fan_out=kind == "gpt2")
        self._tuned = peft.get_peft_model(model_of(kind, head=lm), config)
        self._head = None if lm else nn.Linear(32, LABELS)
        self.parameters: dict[str, nn.Parameter] = {}
        for name in start:
            if not name.startswith("head."):
                (self.parameters[name],) = (
                    one for long, one in self._tuned.named_parameters() if f"{name}.default" in long
                )
            elif self._head is not None:
                self.parameters[name] = self._head.get_parameter(name.removeprefix("head."))
        assert {id(one) for one in self._tuned.parameters() if one.requires_grad} <= {
            id(one) for one in self.parameters.values()
        }
        with torch.no_grad():
            for name, array in start.items():
                self.parameters[name].copy_(torch.from_numpy(array))
        self._optimiser = torch.optim.AdamW(self.parameters.values(), lr=RATE)

    def step(self, tokens: Tokens, targets: Tensor) -> None:
        ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
        out: Any = self._tuned(input_ids=ids, attention_mask=mask.long())
        if self._head is None:
            logits = out.logits[mask]
        else:
            real = mask[..., None].float()
            logits = self._head((out.last_hidden_state * real).sum(dim=1) / real.sum(dim=1))
        self._optimiser.zero_grad()
        functional.cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()

    def arrays(self) -> Weights:
        return {name: one.detach().numpy().copy() for name, one in self.parameters.items()}


class Pair:
    """A device and its trainer, each with an optimiser of its own; what passes between them is f32."""

    def __init__(self, upper: SplitModel, lower: LowerHalf) -> None:
        self._upper, self._lower = upper, lower
        lower.load(lower_part(upper, lower.cut))
        self._mine = {name: nn.Parameter(torch.from_numpy(array)) for name, array in lower.arrays().items()}
        theirs = [one for name, one in upper.parameters.items() if name not in self._mine]
        self._optimisers = [
            torch.optim.AdamW(group, lr=RATE) for group in (theirs, list(self._mine.values()))
        ]

    def step(self, tokens: Tokens, targets: Tensor) -> None:
        for optimiser in self._optimisers:
            optimiser.zero_grad()
        passed = self._lower.forward(tokens)
        states = torch.from_numpy(passed.states.copy()).requires_grad_()
        loss_of(self._upper, self._upper.answers(self._lower.cut, states, passed.lengths), targets).backward()  # type: ignore[no-untyped-call]
        assert states.grad is not None
        for name, gradient in passed.backward(states.grad.numpy()).items():
            self._mine[name].grad = torch.from_numpy(gradient)
        for optimiser in self._optimisers:
            optimiser.step()
        self._lower.load({name: one.detach().numpy() for name, one in self._mine.items()})

    def arrays(self) -> Weights:
        return self._upper.arrays() | self._lower.arrays()


def furthest(found: Weights, wanted: Weights) -> float:
    assert found.keys() == wanted.keys()
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)


def mean(several: Sequence[Weights]) -> Weights:
    return {name: np.mean([one[name] for one in several], axis=0) for name in several[0]}


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize(("kind", "lm"), [("bert", False), ("llama", True), ("gpt2", True)])
def test_after_fifty_steps_the_weights_are_those_of_lora_on_the_whole_model(
    kind: str, lm: bool, cut: int
) -> None:
    upper = split_model(kind, lm=lm)
    start = upper.arrays()
    pair, whole = Pair(upper, lower_half(kind, cut, lm=lm)), Reference(kind, start, lm=lm)
    reader = backbone(kind)
    for number in range(STEPS):
        tokens = tokens_of(reader, 4, number)
        targets = some_targets(upper, tokens, number)
        pair.step(tokens, targets)
        whole.step(tokens, targets)
    assert furthest(whole.arrays(), start) > 0.05
    assert furthest(pair.arrays(), whole.arrays()) < CLOSE


@pytest.mark.parametrize(("kind", "lm"), [("bert", False), ("llama", True)])
def test_devices_with_unequal_cuts_that_are_averaged_are_fedavg_lora(kind: str, lm: bool) -> None:
    """The published form: each device's halves step k times from the mean, and the mean is taken again."""
    upper, reader, local_steps = split_model(kind, lm=lm), backbone(kind), 4
    devices = [lower_half(kind, cut, lm=lm) for cut in (1, 2, 3)]
    split = whole = upper.arrays()
    for number in range(3):
        by_halves, by_wholes = [], []
        for device, lower in enumerate(devices):
            upper.load(split)
            pair, reference = Pair(upper, lower), Reference(kind, whole, lm=lm)
            for step in range(local_steps):
                seed = 100 * number + 10 * device + step
                tokens = tokens_of(reader, 4, seed)
                targets = some_targets(upper, tokens, seed)
                pair.step(tokens, targets)
                reference.step(tokens, targets)
            by_halves.append(pair.arrays())
            by_wholes.append(copy.deepcopy(reference.arrays()))
        split, whole = mean(by_halves), mean(by_wholes)
    assert furthest(split, whole) < CLOSE
