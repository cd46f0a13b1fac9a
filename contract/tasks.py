"""The tasks a job can have: what a sample's target is, how it travels, what the side-network answers.

Targets travel as bytes, in one of these forms:

================ ==================================================================================
``labels``       u16[K]: a label index for each row
``tokens``       u16[T], or u24[T] where the vocabulary asks for it: the token that follows each vector
================ ==================================================================================

Legend: K rows (samples) of a batch, T vectors in all rows together, C labels.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contract.errors import DecodeError

Targets = npt.NDArray[Any]
NO_TARGET: Final = -100
"""Stands for the target of a vector that has none."""


class Task(str, enum.Enum):
    """What a job learns."""

    TEXT_CLASSIFICATION = "text-classification"
    CAUSAL_LM = "causal-lm"
    """Every token of a text is foretold from those before it."""


class TargetForm(str, enum.Enum):
    """How the targets of a batch are written."""

    LABELS = "labels"
    TOKENS = "tokens"


PER_VECTOR: Final = frozenset({TargetForm.TOKENS})
"""Forms that hold a target for every vector."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What both ends must know of a task."""

    form: TargetForm
    """How its targets travel."""
    named: bool
    """Whether its answers have names, the job's labels, which must be fixed before anything is computed."""

    @property
    def per_vector(self) -> bool:
        """Whether every vector has a target and an answer of its own, and not the row as a whole."""
        return self.form in PER_VECTOR

    @property
    def generates(self) -> bool:
        """Whether the backbone's own output head answers, and the side-network adds to what goes into it."""
        return self.form is TargetForm.TOKENS

    def outputs(self, labels: int) -> int:
        """Numbers in one answer of the side-network, with so many labels."""
        return labels if self.named else 1


TASKS: Final[dict[Task, TaskSpec]] = {
    Task.TEXT_CLASSIFICATION: TaskSpec(form=TargetForm.LABELS, named=True),
    Task.CAUSAL_LM: TaskSpec(form=TargetForm.TOKENS, named=False),
}
if set(TASKS) != set(Task):  # pragma: no cover
    raise AssertionError("every Task needs an entry in TASKS")


def read_targets(form: TargetForm, data: bytes, *, rows: int, vectors: int) -> Targets:
    """Targets as an array, row after row; copies nothing that it need not.

    Args:
        form: How they are written.
        data: The bytes.
        rows: K.
        vectors: T.

    Raises:
        DecodeError: if they are not the targets of so many rows and vectors.
    """
    return _FORMS[form].read(data, rows, vectors)


def check_targets(form: TargetForm, targets: Targets, labels: int) -> None:
    """Hold targets against the job's labels, or the tier's vocabulary.

    Raises:
        DecodeError: if one names a label or a token that there is not.
    """
    _FORMS[form].check(targets, labels)


@dataclass(frozen=True, kw_only=True)
class _Form:
    read: Callable[[bytes, int, int], Targets]
    check: Callable[[Targets, int], None]


def _read_labels(data: bytes, rows: int, vectors: int) -> Targets:
    if len(data) != 2 * rows:
        raise DecodeError(f"targets must be u16 for each of the {rows} samples")
    return np.frombuffer(data, "<u2")


def _check_labels(targets: Targets, labels: int) -> None:
    if int(targets.max()) >= labels:
        raise DecodeError(f"a target lies outside the {labels} labels")


_U24: Final = 3


def write_tokens(tokens: npt.NDArray[Any], vocabulary: int) -> bytes:
    """Token numbers as they travel."""
    if vocabulary <= 2**16:
        return tokens.astype("<u2").tobytes()
    return np.ascontiguousarray(tokens.astype("<u4")).view(np.uint8).reshape(-1, 4)[:, :_U24].tobytes()


def _read_tokens(data: bytes, rows: int, vectors: int) -> Targets:
    if len(data) == 2 * vectors:
        return np.frombuffer(data, "<u2")
    if len(data) != _U24 * vectors:
        raise DecodeError(f"targets must be u16 or u24 for each of the {vectors} vectors")
    wide = np.zeros((vectors, 4), np.uint8)
    wide[:, :_U24] = np.frombuffer(data, np.uint8).reshape(-1, _U24)
    tokens: Targets = wide.view("<u4")[:, 0]
    return tokens


def _check_tokens(targets: Targets, vocabulary: int) -> None:
    if int(targets.max()) >= vocabulary:
        raise DecodeError(f"a target lies outside the vocabulary of {vocabulary} tokens")


_FORMS: Final[dict[TargetForm, _Form]] = {
    TargetForm.LABELS: _Form(read=_read_labels, check=_check_labels),
    TargetForm.TOKENS: _Form(read=_read_tokens, check=_check_tokens),
}
if set(_FORMS) != set(TargetForm):  # pragma: no cover
    raise AssertionError("every TargetForm needs an entry in _FORMS")
