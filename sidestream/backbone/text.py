"""What goes through a text backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Text: TypeAlias = str | tuple[str, str]
"""A text, or a pair of them."""


def seeds_of(texts: Sequence[Text]) -> npt.NDArray[np.int64]:
    """[K]: a hash of each text, the same on every machine and in every run."""
    joined = [text if isinstance(text, str) else "\0".join(text) for text in texts]
    digests = [hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest() for text in joined]
    return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)
