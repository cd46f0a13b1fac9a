"""What samples are to be answered with: from labels as they stand in the data to the bytes that travel.

In the data a label is one piece of text, whatever the task: a name; names of a set, as a JSON list or between
bars; a number; a JSON list with a name for each word. Knows no network and no files.

Legend: K rows (samples) of a batch, W words, T vectors in all rows together, C labels.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sidestream.backbone.sampled import Sampled
from sidestream.contract.quality import Tally, tally_labels, tally_sets, tally_values
from sidestream.contract.spelling import alike
from sidestream.contract.tasks import TASKS, Scale, Task
from sidestream.contract.tensors import Floats

SEPARATOR: Final = "|"
_FOREIGN: Final = -1
Target = npt.NDArray[Any]


class Unusable(Exception):  # noqa: N818  (the sample is at fault, and is skipped)
    """Why a sample cannot be used.

    Args:
        why: In words; it may quote the label.
        counter: Which of Telemetry's counters says so.
    """

    def __init__(self, why: str, counter: str = "skipped_label") -> None:
        super().__init__(why)
        self.counter = counter


class Targets(ABC):
    """The targets of one job.

    Args:
        labels: The job's, in index order.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._index = {name: index for index, name in enumerate(labels)}

    @staticmethod
    @abstractmethod
    def names(label: str) -> Sequence[str]:
        """The label names in a label, for a job that has yet to learn them."""

    @abstractmethod
    def read(self, label: str, text: str, *, judge: bool = False) -> Target:
        """One sample's target.

        Args:
            label: As it stands in the data.
            text: Of the same sample.
            judge: It is for evaluation: names that the job does not have are kept as such, to be counted as
                answered wrongly.

        Raises:
            Unusable: the job can do nothing with it.
        """

    def stack(self, targets: Sequence[Target], sampled: Sampled) -> Target:
        """Targets of the rows of ``sampled``: [K, …], or [T] where every vector has one."""
        return np.stack(targets)

    @abstractmethod
    def pack(self, stacked: Target) -> bytes:
        """As they travel (:mod:`sidestream.contract.tasks`)."""

    @abstractmethod
    def tally(self, answers: Floats, stacked: Target, scale: Scale) -> Tally:
        """How good the side-network's answers are, [K, C] or [T, C]."""


class LabelTargets(Targets):
    """One label a sample."""

    @staticmethod
    def names(label: str) -> Sequence[str]:
        if label.startswith('["'):
            raise Unusable(f"label {label[:80]!r} is a list; this job has one label a sample")
        return (label,)

    def read(self, label: str, text: str, *, judge: bool = False) -> Target:
        self.names(label)
        return np.array(_index(self._index, label, judge))

    def pack(self, stacked: Target) -> bytes:
        return stacked.astype("<u2").tobytes()

    def tally(self, answers: Floats, stacked: Target, scale: Scale) -> Tally:
        return tally_labels(answers.argmax(axis=1), stacked, len(self._labels))


class SetTargets(Targets):
    """Any number of labels a sample. The last column of a target says that it has labels of no job."""

    @staticmethod
    def names(label: str) -> Sequence[str]:
        if label.startswith("["):
            return _list(label)
        return [part for part in map(str.strip, label.split(SEPARATOR)) if part]

    def read(self, label: str, text: str, *, judge: bool = False) -> Target:
        target = np.zeros(len(self._labels) + 1, bool)
        target[[_index(self._index, name, judge) for name in self.names(label)]] = True
        return target

    def pack(self, stacked: Target) -> bytes:
        return np.packbits(stacked[:, :-1], axis=1, bitorder="little").tobytes()

    def tally(self, answers: Floats, stacked: Target, scale: Scale) -> Tally:
        return tally_sets(answers > 0, stacked[:, :-1], foreign=stacked[:, -1])


class ValueTargets(Targets):
    """A number a sample."""

    @staticmethod
    def names(label: str) -> Sequence[str]:
        return ()

    def read(self, label: str, text: str, *, judge: bool = False) -> Target:
        try:
            value = float(label)
        except ValueError as exc:
            raise Unusable(f"label {label[:80]!r} is no number") from exc
        if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
            raise Unusable(f"label {label[:80]!r} is no finite number")
        return np.array(value, np.float32)

    def pack(self, stacked: Target) -> bytes:
        return stacked.astype("<f4").tobytes()

    def tally(self, answers: Floats, stacked: Target, scale: Scale) -> Tally:
        return tally_values(values(answers, scale), stacked)


class WordTargets(Targets):
    """A label for every word of a sample."""

    @staticmethod
    def names(label: str) -> Sequence[str]:
        return _list(label)

    def read(self, label: str, text: str, *, judge: bool = False) -> Target:
        names, words = self.names(label), text.split()
        if len(names) != len(words):
            raise Unusable(f"{len(names)} labels for {len(words)} words")
        return np.array([_index(self._index, name, judge) for name in names])

    def stack(self, targets: Sequence[Target], sampled: Sampled) -> Target:
        assert sampled.words is not None
        rows = np.split(sampled.words, np.cumsum(sampled.lengths)[:-1])
        return np.concatenate([target[words] for target, words in zip(targets, rows, strict=True)])

    def pack(self, stacked: Target) -> bytes:
        return stacked.astype("<u2").tobytes()

    def tally(self, answers: Floats, stacked: Target, scale: Scale) -> Tally:
        return tally_labels(answers.argmax(axis=1), stacked, len(self._labels))


_KINDS: Final[Mapping[Task, type[Targets]]] = {
    Task.TEXT_CLASSIFICATION: LabelTargets,
    Task.MULTI_LABEL: SetTargets,
    Task.REGRESSION: ValueTargets,
    Task.TOKEN_CLASSIFICATION: WordTargets,
    Task.IMAGE_CLASSIFICATION: LabelTargets,
}
if {*_KINDS, Task.CAUSAL_LM} != set(Task):  # pragma: no cover  (a language model's truth is its text)
    raise AssertionError("every Task needs its Targets")


def targets_of(task: Task, labels: Sequence[str]) -> Targets:
    """The targets of a job."""
    return _KINDS[task](labels)


def names_in(task: Task, label: str) -> Sequence[str]:
    """The label names in one sample's label; none where it cannot be read, or the task has none."""
    try:
        return _KINDS[task].names(label) if TASKS[task].named else ()
    except Unusable:
        return ()


def values(answers: Floats, scale: Scale) -> Floats:
    """[K, 1] of a regression -> [K], in the targets' own measure."""
    found: Floats = (answers[:, 0].astype(np.float64) * scale.deviation + scale.mean).astype(np.float32)
    return found


def _index(index: Mapping[str, int], name: str, judge: bool) -> int:
    found = index.get(name)
    if found is not None:
        return found
    if judge:
        return _FOREIGN
    near = next((known for known in index if alike(known) == alike(name)), None)
    hint = f"; it has {near!r}: write it like that" if near is not None else ""
    raise Unusable(f"label {name[:80]!r} is not one of the job's {len(index)} labels, which are fixed{hint}")


def _list(label: str) -> list[str]:
    try:
        names = json.loads(label)
    except (ValueError, RecursionError) as exc:
        raise Unusable(f"label {label[:80]!r} is no list") from exc
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Unusable(f"label {label[:80]!r} is no list of names")
    return names
