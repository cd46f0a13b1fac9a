"""What a device does for one batch of text in a language-model job, method by method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from torch import Tensor

from benchmarks.lm_data import TIER, trainer_settings
from benchmarks.lm_tuned import window_loss
from benchmarks.lora import add_lora
from benchmarks.steps import Step, Traffic, TrainStep
from benchmarks.workload import JOB
from contract.plan import Plan, tap_layers
from contract.wire import TARGET_MESSAGE_BYTES
from edge_agent.language_model import LanguageModel
from edge_agent.outbox import Slot
from edge_agent.samples import Sample
from edge_agent.token_maker import TokenMaker


class Loaded(NamedTuple):
    """A decoder for a step."""

    whole: Any
    """Transformers' own, with its head; what a method that trains needs."""
    model: LanguageModel
    """The agent's, of the same weights."""


class TokenStep:
    """Sidestream's: forward, sample, quantise, pack, by the agent's own code and the task's defaults."""

    trainable = 0

    def __init__(self, loaded: Loaded, tokens: int) -> None:
        model, config = loaded.model, trainer_settings("measured", tokens, {})
        tier = msgspec.structs.replace(
            config.tiers[TIER].to_plan(),
            depth=model.depth,
            width=model.width,
            taps=tap_layers(model.depth, config.side_network.blocks),
            fingerprint=model.fingerprint,
            head=model.head_fingerprint,
            vocabulary=model.head.vocabulary,
        )
        plan = Plan(job=JOB, run="0" * 32, revision=0, task=config.task, labels=(), tiers={TIER: tier})
        self._maker = TokenMaker(model, plan, TIER, TARGET_MESSAGE_BYTES)

    def warm(self, texts: Sequence[str]) -> None:
        self.run(texts)

    def run(self, texts: Sequence[str]) -> Traffic:
        ready = [self._maker.ready(Sample(text, None, b""))[0] for text in texts]
        sampled = self._maker.compute(ready, lambda lengths: self._maker.sampling)
        rows, up = np.arange(len(sampled.mask)), 0
        for part in self._maker.split(sampled, rows):
            targets = [None] * len(rows)
            up += len(self._maker.packer(sampled, targets, part)(Slot("0" * 32, 1, 1, 0)))
        return Traffic(up=up, down=0)


def _lora(loaded: Loaded, tokens: int) -> Step:
    add_lora(loaded.whole)
    return TrainStep(loaded.whole, _loss(loaded, tokens))


def _full(loaded: Loaded, tokens: int) -> Step:
    return TrainStep(loaded.whole.requires_grad_(True), _loss(loaded, tokens))


def _loss(loaded: Loaded, tokens: int) -> Callable[[Sequence[str]], Tensor]:
    def loss(texts: Sequence[str]) -> Tensor:
        windows = [window for text in texts for window in loaded.model.windows(text, None, tokens)[:1]]
        return window_loss(loaded.whole, windows)

    return loss


LM_STEPS: Final[Mapping[str, Callable[[Loaded, int], Step]]] = {
    "lm-agent": TokenStep,
    "lm-lora": _lora,
    "lm-full": _full,
}
"""Methods by name: made from a loaded decoder and the most tokens of a window."""
