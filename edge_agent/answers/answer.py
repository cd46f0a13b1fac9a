"""What backbone and side-network answer a text with, by task, from the side-network's numbers. Pure.

Legend: K texts, V vectors of all texts, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TypeAlias

import msgspec
import numpy as np

from edge_agent.batches.targets import values
from sidestream.backbone.inputs import Input, text_of
from sidestream.backbone.sampled import Sampled
from sidestream.contract.tasks import Scale, Task
from sidestream.contract.tensors import Floats
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
    task: Task, labels: Sequence[str], numbers: Floats, sampled: Sampled, texts: Sequence[Input], scale: Scale
) -> list[Answer]:
    """The answers to K texts.

    Args:
        task: The job's.
        labels: C names in index order.
        numbers: The side-network's answers, [K, C] or [V, C].
        sampled: What they were computed from.
        texts: K of them.
        scale: The measure of a regression's numbers.
    """
    if task is Task.REGRESSION:
        return [Number(value=float(value)) for value in values(numbers, scale)]
    if task is Task.MULTI_LABEL:
        return [_label_set(labels, row) for row in 0.5 + 0.5 * np.tanh(0.5 * numbers)]
    best = _likeliest(labels, numbers)
    if task is not Task.TOKEN_CLASSIFICATION:
        return list(best)
    assert sampled.words is not None
    by_vector = zip(sampled.words.tolist(), best, strict=True)
    rows = zip(sampled.lengths.tolist(), texts, strict=True)
    return [_word_labels(dict(islice(by_vector, length)), text) for length, text in rows]


def _label_set(labels: Sequence[str], shares: Floats) -> LabelSet:
    order = (-shares).argsort().tolist()
    return LabelSet(labels={labels[at]: float(shares[at]) for at in order if shares[at] > _LIKELY})


def _likeliest(labels: Sequence[str], numbers: Floats) -> list[Prediction]:
    """Of logits [K, C]: the likeliest label of each row, with its softmax."""
    shares = np.exp(numbers - numbers.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    pairs = zip(shares.argmax(axis=1).tolist(), shares.max(axis=1).tolist(), strict=True)
    return [Prediction(label=labels[index], probability=share) for index, share in pairs]


def _word_labels(found: Mapping[int, Prediction], text: Input) -> WordLabels:
    """Every word's answer, of those that were found by the word's number."""
    words = []
    for number, word in enumerate(text_of(text).split()):
        one = found.get(number, Prediction(label="", probability=0.0))
        words.append(WordLabel(word=word, label=one.label, probability=one.probability))
    return WordLabels(words=tuple(words))
