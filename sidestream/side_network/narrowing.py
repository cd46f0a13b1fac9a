"""In how few directions weights may travel: the fewest by which answers hardly change.

Which share of a matrix's change that is says little by itself (docs/decisions/0045): with two labels half of
it was enough, where the order of words decides nine tenths were not quite. So the latest rows are asked.

Legend: K rows, C labels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sidestream.contract.tensors import Floats
from sidestream.side_network.change import Directions, directions_of, narrowed, restored
from sidestream.side_network.initial import initial

SHARES: Final = tuple(share / 100 for share in range(50, 100, 2))
"""Of the square of what has changed, that are tried."""
MOST_APART: Final = 2e-4
"""How far answers may move: Kullback and Leibler's divergence, in nats a row."""
MOST_APART_PASSING: Final = 2e-3
"""The same of a version that another will replace."""

Answers = Callable[[Mapping[str, Floats]], npt.NDArray[np.float64]]
"""[K, C] of some rows by some weights: logarithms of shares."""


class Narrow(NamedTuple):
    """A way to write weights as narrow matrices."""

    directions: Mapping[str, Sequence[Directions]]
    """Of each matrix."""
    kept: float
    """The share of its change that is kept."""

    def of(self, tensors: Mapping[str, Floats]) -> dict[str, Floats]:
        """The weights, or those of their first blocks, written so."""
        return narrowed(tensors, self.directions, self.kept)


def narrowest(
    weights: Mapping[str, Floats], seed: int, answers: Answers, most: float = MOST_APART
) -> Narrow | None:
    """The way that takes least and is good enough; None if none is.

    Args:
        weights: All of them.
        seed: The learner's, by which they began.
        answers: Of rows that ways are judged by.
        most: How far they may move.
    """
    began = cache(partial(initial, seed))  # drawn once, for all shares that are tried
    directions, whole = directions_of(weights, began), answers(weights)

    def is_good(kept: float) -> bool:
        moved = whole - answers(restored(narrowed(weights, directions, kept), began))
        return float((np.exp(whole) * moved).sum(axis=-1).mean()) <= most

    at = bisect_left(SHARES, True, key=is_good)
    return Narrow(directions, SHARES[at]) if at < len(SHARES) else None


class Narrowing:
    """Finds it once for the same weights."""

    def __init__(self) -> None:
        self._after = -1
        self._found: dict[float, Narrow | None] = {}

    def of(self, updates: int, find: Callable[[float], Narrow | None], *, final: bool) -> Narrow | None:
        """What ``find`` finds for how far answers may move, of weights after so many updates."""
        if self._after != updates:
            self._after, self._found = updates, {}
        most = MOST_APART if final else MOST_APART_PASSING
        if most not in self._found:
            self._found[most] = find(most)
        return self._found[most]
