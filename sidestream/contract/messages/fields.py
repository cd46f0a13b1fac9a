"""What fields of several messages hold, and how they are checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from sidestream.contract.errors import DecodeError

MAX_ROWS: Final = 1024
MAX_STREAMS: Final = 16
MAX_LABELS: Final = 1024
MAX_LABEL_CHARS: Final = 128
_STREAM = re.compile(r"[0-9a-f]{32}")
_LARGEST = 2**62

Count = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST)]
Place = Annotated[int, msgspec.Meta(ge=1, le=_LARGEST)]
ShortText = Annotated[str, msgspec.Meta(max_length=512)]


def check_stream(stream: str) -> None:
    """Refuse what is no id of an outbox or a journal.

    Raises:
        DecodeError: if it is not 32 lower-case hexadecimal digits.
    """
    if not _STREAM.fullmatch(stream):
        raise DecodeError("the id of a stream or run is 32 hexadecimal digits")


def check_labels(labels: Sequence[str]) -> None:
    """Refuse a list of label names that no job may have.

    Raises:
        DecodeError: if there are too many, one is empty or too long, or two are equal.
    """
    if len(labels) > MAX_LABELS:
        raise DecodeError(f"{len(labels)} labels; a job has at most {MAX_LABELS}")
    if any(not 1 <= len(label) <= MAX_LABEL_CHARS for label in labels):
        raise DecodeError(f"a label name has 1 to {MAX_LABEL_CHARS} characters")
    if any(label != label.strip() for label in labels):
        raise DecodeError("a label name neither begins nor ends with white space")
    if len(set(labels)) != len(labels):
        raise DecodeError("two labels have the same name")


def to_bin(values: npt.ArrayLike, dtype: str) -> bytes:
    """Integers as little-endian bytes; the inverse of ``np.frombuffer(…, dtype)``."""
    return np.asarray(values).astype(dtype).tobytes()
