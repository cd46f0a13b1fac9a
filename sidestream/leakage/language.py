"""What the public text says of sentences before any upload is seen: how often tokens are, and follow each other.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np

from sidestream.backbone.sampled import Ints
from sidestream.contract.tensors import Floats

_UNSEEN: Final = 0.05  # of an occurrence, for tokens that the public text does not have
_BACKOFF: Final = 8.0  # occurrences that the token alone counts for, beside the pair
_NEVER: Final = -1e9


class Language:
    """Token and pair frequencies, smoothed.

    Args:
        sentences: Token ids of public text.
        vocabulary: V.
        never: Tokens that no text has.
    """

    def __init__(self, sentences: Sequence[Ints], vocabulary: int, never: Collection[int]) -> None:
        flat = np.concatenate(sentences)
        counts = np.bincount(flat, minlength=vocabulary)[:vocabulary] + _UNSEEN
        counts[list(never)] = 0.0
        self.frequencies: Floats = (counts / counts.sum()).astype(np.float32)
        """[V]."""
        with np.errstate(divide="ignore"):
            self.logs: Floats = np.maximum(np.log(self.frequencies), _NEVER).astype(np.float32)
        """[V]: of these, the natural logarithm."""
        pairs = np.concatenate([one[:-1] * vocabulary + one[1:] for one in sentences])
        self._vocabulary = vocabulary
        self._pairs, self._pair_counts = np.unique(pairs, return_counts=True)
        self._firsts = np.bincount(flat, minlength=vocabulary)

    def surprise(self, sentences: Ints) -> Floats:
        """[K]: minus the logarithm of how likely sentences [K, T] are, by pairs of tokens."""
        first, second = sentences[:, :-1], sentences[:, 1:]
        pairs = first * self._vocabulary + second
        places = np.searchsorted(self._pairs, pairs).clip(0, len(self._pairs) - 1)
        seen = np.where(self._pairs[places] == pairs, self._pair_counts[places], 0)
        mass = seen + _BACKOFF * self.frequencies[second]
        surprise: Floats = -np.log(np.maximum(mass / (self._firsts[first] + _BACKOFF), 1e-12)).sum(axis=1)
        return surprise
