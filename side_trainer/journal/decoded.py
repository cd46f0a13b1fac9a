"""What the ingest thread has decoded of batches that it just journaled, handed on to whoever folds them.

Only a shortcut: what is not here is decoded from its record, to the same values.
"""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

from sidestream.contract.messages import ActivationBatch
from sidestream.contract.tensors import Floats

_MAX_BYTES: Final = 32 * 2**20


class Decoded(NamedTuple):
    """A batch and its values."""

    batch: ActivationBatch
    """As it is in its record."""
    values: Floats
    """[B, T, d]: its activations, dequantised."""


class DecodedBatches:
    """By offset, until they are folded. Safe between threads.

    One that finds no room is left out: records are folded in order, so the oldest are wanted first.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._waiting: dict[int, Decoded] = {}
        self._folded = 0
        self._lock = threading.Lock()

    def put(self, offset: int, decoded: Decoded) -> None:
        """Hand on the batch of a record that is committed."""
        size = decoded.values.nbytes
        with self._lock:
            if offset > self._folded and self._bytes + size <= self._max_bytes:
                self._waiting[offset] = decoded
                self._bytes += size

    def take(self, offset: int) -> Decoded | None:
        """The batch of a record that is folded now, if it was handed on; none before it is wanted again."""
        with self._lock:
            self._folded = max(self._folded, offset)
            found = self._waiting.get(offset)
            for passed in [one for one in self._waiting if one <= offset]:
                self._bytes -= self._waiting.pop(passed).values.nbytes
        return found
