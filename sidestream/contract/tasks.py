"""The tasks a job can have: what a sample's target is, how it travels, what the side-network answers.

Targets travel as bytes, in one of these forms:

================ ==================================================================================
``labels``       u16[K]: a label index for each row
``tokens``       u16[T], or u24[T] where the vocabulary asks for it: the token that follows each vector
``label-sets``   u8[K, ceil(C / 8)]: bit c of a row, lowest first, says that it has label c
``values``       f32[K]: a finite number for each row
``token-labels`` u16[T]: a label index for each vector
================ ==================================================================================

Legend: K rows (samples) of a batch, T vectors in all rows together, C labels.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from sidestream.contract.errors import DecodeError
from sidestream.contract.wire import prepared

Targets = npt.NDArray[Any]
NO_TARGET: Final = -100
"""Stands for the target of a vector that has none."""


class Task(str, enum.Enum):
    """What a job learns."""

    TEXT_CLASSIFICATION = "text-classification"
    """A text, or a pair of them, has one of the labels."""
    CAUSAL_LM = "causal-lm"
    """Every token of a text is predicted from those before it."""
    MULTI_LABEL = "multi-label-classification"
    """A text has any number of the labels, none included."""
    REGRESSION = "regression"
    """A text has a number."""
    TOKEN_CLASSIFICATION = "token-classification"
    """Every word of a text has one of the labels."""
    IMAGE_CLASSIFICATION = "image-classification"
    """An image has one of the labels."""


class Modality(str, enum.Enum):
    """What samples are."""

    TEXT = "text"
    IMAGE = "image"


class TargetForm(str, enum.Enum):
    """How the targets of a batch are written."""

    LABELS = "labels"
    TOKENS = "tokens"
    LABEL_SETS = "label-sets"
    VALUES = "values"
    TOKEN_LABELS = "token-labels"


PER_VECTOR: Final = frozenset({TargetForm.TOKENS, TargetForm.TOKEN_LABELS})
"""Forms that hold a target for every vector."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What both ends must know of a task."""

    form: TargetForm
    """How its targets travel."""
    named: bool
    """Whether its answers have names, the job's labels, which must be fixed before anything is computed."""
    modality: Modality = Modality.TEXT
    """What its samples are."""

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


@prepared
class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """What the side-network's numbers are measured in: an answer of 1 is ``mean + deviation``."""

    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.deviation) and self.deviation > 0):
            raise DecodeError("a scale needs a finite mean and a positive deviation")


TASKS: Final[dict[Task, TaskSpec]] = {
    Task.TEXT_CLASSIFICATION: TaskSpec(form=TargetForm.LABELS, named=True),
    Task.CAUSAL_LM: TaskSpec(form=TargetForm.TOKENS, named=False),
    Task.MULTI_LABEL: TaskSpec(form=TargetForm.LABEL_SETS, named=True),
    Task.REGRESSION: TaskSpec(form=TargetForm.VALUES, named=False),
    Task.TOKEN_CLASSIFICATION: TaskSpec(form=TargetForm.TOKEN_LABELS, named=True),
    Task.IMAGE_CLASSIFICATION: TaskSpec(form=TargetForm.LABELS, named=True, modality=Modality.IMAGE),
}
if set(TASKS) != set(Task):  # pragma: no cover
    raise AssertionError("every Task needs an entry in TASKS")


def read_targets(form: TargetForm, data: bytes, *, rows: int, vectors: int) -> Targets:
    """Targets as an array: [K] or [T] as the form says, label sets as bool[K, 8·ceil(C / 8)].

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


def select_targets(data: bytes, picked: npt.NDArray[np.integer[Any]], count: int) -> bytes:
    """Only some of the targets, as they were written: in every form they take equally many bytes each.

    Args:
        data: The bytes, which :func:`read_targets` has accepted.
        picked: Which of them.
        count: How many there are in all: K, or T where every vector has one.
    """
    selected: npt.NDArray[np.uint8] = np.frombuffer(data, np.uint8).reshape(count, -1)[picked]
    return selected.tobytes()


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


def _read_sets(data: bytes, rows: int, vectors: int) -> Targets:
    if not data or len(data) % rows:
        raise DecodeError(f"targets must be equally many bytes for each of the {rows} samples")
    bits: Targets = np.unpackbits(np.frombuffer(data, "u1").reshape(rows, -1), axis=1, bitorder="little")
    return bits.astype(bool)


def _check_sets(targets: Targets, labels: int) -> None:
    if targets.shape[1] != 8 * -(-labels // 8) or targets[:, labels:].any():
        raise DecodeError(f"a target is no set of the {labels} labels")


def _read_values(data: bytes, rows: int, vectors: int) -> Targets:
    if len(data) != 4 * rows:
        raise DecodeError(f"targets must be f32 for each of the {rows} samples")
    values = np.frombuffer(data, "<f4")
    if not np.isfinite(values).all():
        raise DecodeError("a target is not finite")
    return values


def _read_token_labels(data: bytes, rows: int, vectors: int) -> Targets:
    if len(data) != 2 * vectors:
        raise DecodeError(f"targets must be u16 for each of the {vectors} vectors")
    return np.frombuffer(data, "<u2")


_FORMS: Final[dict[TargetForm, _Form]] = {
    TargetForm.LABELS: _Form(read=_read_labels, check=_check_labels),
    TargetForm.TOKENS: _Form(read=_read_tokens, check=_check_tokens),
    TargetForm.LABEL_SETS: _Form(read=_read_sets, check=_check_sets),
    TargetForm.VALUES: _Form(read=_read_values, check=lambda targets, labels: None),
    TargetForm.TOKEN_LABELS: _Form(read=_read_token_labels, check=_check_labels),
}
if set(_FORMS) != set(TargetForm):  # pragma: no cover
    raise AssertionError("every TargetForm needs an entry in _FORMS")
