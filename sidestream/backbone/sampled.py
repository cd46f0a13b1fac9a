"""Sampled activations, as they travel and as the side-network takes them: row after row, without padding.

Legend: B taps, K rows (samples, or pieces of them), V vectors of all rows, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sidestream.contract.tensors import Floats

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a forward pass leaves behind."""

    vectors: Floats
    """[B, V, d]: each row's vectors after those of the row before."""
    lengths: Ints
    """[K]: how many vectors each row has, one at least."""
    words: Ints | None = None
    """[V], where every word has a vector: which word it is; -1 for none."""
    seconds: float = 0.0
    """What the forward pass took, tokenising and sampling included."""
    targets: Ints | None = None
    """[V], in a language model: the token that follows."""
    owners: Ints | None = None
    """[K] where rows were cut into several: whose each one is, as an index into what was computed."""

    def usable_rows(self) -> Bools:
        """[K]: rows without NaN or infinity, and with a word where words are wanted."""
        usable = np.isfinite(self.vectors).all(axis=(0, 2))
        if self.words is not None:
            usable &= self.words >= 0
        return np.logical_and.reduceat(usable, starts_of(self.lengths))

    def select(self, rows: Bools | Ints | Sequence[int]) -> Sampled:
        """Only some of the rows: [K] bool, or their indices."""
        chosen = np.arange(len(self.lengths))[rows]
        lengths = self.lengths[chosen]
        shifts = starts_of(self.lengths)[chosen] - starts_of(lengths)
        places = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
        return replace(
            self,
            vectors=self.vectors[:, places],
            lengths=lengths,
            words=None if self.words is None else self.words[places],
            targets=None if self.targets is None else self.targets[places],
        )


def starts_of(lengths: Ints) -> Ints:
    """[K]: where runs of so many begin that follow one another."""
    starts: Ints = np.cumsum(lengths) - lengths
    return starts
