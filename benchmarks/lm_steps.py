"""What a device does for one batch of text in a language-model job, method by method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor

from benchmarks.lm_tuned import window_loss
from benchmarks.lora import add_lora
from benchmarks.steps import Step, TrainStep
from edge_agent.language_model import LanguageModel


class Loaded(NamedTuple):
    """A decoder for a step."""

    whole: Any
    """Transformers' own, with its head; what a method that trains needs."""
    model: LanguageModel
    """The agent's, of the same weights."""


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
    "lm-lora": _lora,
    "lm-full": _full,
}
"""Methods by name: made from a loaded decoder and the most tokens of a window."""
