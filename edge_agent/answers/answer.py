"""What backbone and side-network answer a text with, by task, from the side-network's numbers. Pure.

Legend: K texts, N vectors a text (padded), C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec
import torch
from torch import Tensor

from edge_agent.batches.targets import values
from sidestream.backbone.taps import Sampled
from sidestream.backbone.text import Text
from sidestream.contract.tasks import Scale, Task
from sidestream.contract.wire import prepared

_LIKELY = 0.5


@prepared
class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Of text classification."""

    label: str
    """The label's name."""
    probability: float
    """What the side-network gives it, 0 to 1."""

    def __str__(self) -> str:
        return f"{self.label}\t{self.probability:.3f}"


@prepared
class LabelSet(msgspec.Struct, frozen=True, kw_only=True):
    """Of multi-label classification."""

    labels: dict[str, float]
    """The labels that are likelier than not, the likeliest first, with their probabilities."""

    def __str__(self) -> str:
        return ", ".join(f"{label} {share:.3f}" for label, share in self.labels.items()) or "-"


@prepared
class Number(msgspec.Struct, frozen=True, kw_only=True):
    """Of regression."""

    value: float
    """In the measure of the targets."""

    def __str__(self) -> str:
        return f"{self.value:.4g}"


@prepared
class WordLabel(msgspec.Struct, frozen=True, kw_only=True):
    """One word's answer."""

    word: str
    """As it stands in the text."""
    label: str
    """The label's name; empty for a word that was cut off or has no token."""
    probability: float
    """What the side-network gives it; 0 without a label."""


@prepared
class WordLabels(msgspec.Struct, frozen=True, kw_only=True):
    """Of token classification."""

    words: tuple[WordLabel, ...]
    """Every word of the text, in order."""

    def __str__(self) -> str:
        return " ".join(f"{one.word}/{one.label or '-'}" for one in self.words)


Answer: TypeAlias = Prediction | LabelSet | Number | WordLabels


def answers_of(
    task: Task, labels: Sequence[str], numbers: Tensor, sampled: Sampled, texts: Sequence[Text], scale: Scale
) -> list[Answer]:
    """The answers to K texts.

    Args:
        task: The job's.
        labels: C names in index order.
        numbers: The side-network's answers, [K, C] or [K, N, C].
        sampled: What they were computed from.
        texts: K of them.
        scale: The measure of a regression's numbers.
    """
    if task is Task.REGRESSION:
        return [Number(value=float(value)) for value in values(numbers, scale)]
    if task is Task.MULTI_LABEL:
        return [_label_set(labels, row) for row in numbers.sigmoid()]
    if task is Task.TOKEN_CLASSIFICATION:
        rows = enumerate(zip(numbers, texts, strict=True))
        return [_word_labels(labels, row, str(text), sampled, at) for at, (row, text) in rows]
    best = torch.softmax(numbers, dim=1).max(dim=1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Prediction(label=labels[index], probability=probability) for index, probability in pairs]


def _label_set(labels: Sequence[str], shares: Tensor) -> LabelSet:
    order = shares.argsort(descending=True).tolist()
    return LabelSet(labels={labels[at]: float(shares[at]) for at in order if shares[at] > _LIKELY})


def _word_labels(labels: Sequence[str], numbers: Tensor, text: str, sampled: Sampled, row: int) -> WordLabels:
    assert sampled.words is not None
    best = torch.softmax(numbers, dim=1).max(dim=1)
    real = sampled.mask[row]
    known = (sampled.words[row][real].tolist(), best.indices[real].tolist(), best.values[real].tolist())
    by_word = {word: (labels[index], share) for word, index, share in zip(*known, strict=True)}
    words = []
    for number, word in enumerate(text.split()):
        label, share = by_word.get(number, ("", 0.0))
        words.append(WordLabel(word=word, label=label, probability=share))
    return WordLabels(words=tuple(words))
