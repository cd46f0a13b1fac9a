"""Token sampling: from every token's activation to the few vectors that travel.

Applies the policies that :mod:`sidestream.contract.sampling` names. Everything is a gather or a batched
matrix product: no Python runs per token.

A token's *importance* is how far it lies from the rest of its sample: the L2 distance between its vector and
the mean of the sample's real tokens, at the last tapped layer. It needs nothing but the activations.

Legend: K samples, T tokens (padded), N vectors a sample (padded), R tokens of all samples that may be
sampled, V vectors of all samples, d width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sidestream.backbone.sampled import Bools, Ints, Sampled, starts_of
from sidestream.contract.sampling import Sampling
from sidestream.contract.tensors import Floats

Scores = npt.NDArray[np.floating]


class TokenSampler:
    """Samples tap after tap as a forward pass comes to them, so that no other token's activation is kept.

    Only the policies that rank tokens by the last tap keep all of them to the end: that tap decides.

    Args:
        sampling: The policy.
        tokens: [K, T]: which may be sampled, at least one in each row.
        seeds: [K] of :func:`sidestream.backbone.inputs.seeds_of`: what random sampling draws by.
        is_decoder: Whether the pivot is the last token; it is the first one of an encoder.
        score: Ranks tokens by what the last tap says of them, [R, d] -> [R]; their importance if not given.
    """

    def __init__(
        self,
        sampling: Sampling,
        tokens: Bools,
        seeds: Ints,
        *,
        is_decoder: bool = False,
        score: Callable[[Floats], Scores] | None = None,
    ) -> None:
        self.places: Ints = np.flatnonzero(tokens)
        """[V]: where in the flattened [K, T] each vector is from; [R] of means, and until the last tap."""
        self._lengths: Ints = tokens.sum(axis=1)
        self._counts = sampling.counts(self._lengths)
        self._tokens = tokens
        self._parts = self._segments() if sampling.kind in ("mean", "segments") else None
        self._score = (score or self._importance) if sampling.kind in ("important", "hardest") else None
        self._taken: list[Floats] = []
        if sampling.kind == "pivot":
            starts = starts_of(self._lengths)
            self.places = self.places[starts + self._lengths - 1 if is_decoder else starts]
        elif sampling.kind == "random":
            self.places = self.places[self._best(_draws(seeds, tokens.shape[1]).ravel()[self.places])]

    def take(self, tap: Floats) -> None:
        """The next tap, [K, T, d]; nothing of it is kept but what is sampled, and that is a copy."""
        if self._parts is None:
            self._taken.append(tap.reshape(-1, tap.shape[-1])[self.places])
            return
        if not self._tokens.all():  # whatever padding tokens gave, NaN too
            tap = np.where(self._tokens[:, :, None], tap, np.float32(0))
        with np.errstate(invalid="ignore"):
            means = self._parts @ tap  # [K, N, d]
        self._taken.append(means[np.arange(means.shape[1]) < self._counts[:, None]])

    def sampled(self) -> Sampled:
        """What was sampled of the taps taken."""
        if self._score is not None:
            # What is not finite comes first, so that its row is found and skipped.
            scores = np.nan_to_num(self._score(self._taken[-1]), nan=np.inf, posinf=np.inf)
            best, self._score = self._best(scores), None
            self._taken, self.places = [tap[best] for tap in self._taken], self.places[best]
        return Sampled(vectors=np.stack(self._taken), lengths=self._counts)

    def _best(self, scores: Scores) -> Ints:
        """[V]: of the R tokens, each row's so many with the highest scores [R], in the order of the text."""
        rows = np.repeat(np.arange(len(self._lengths)), self._lengths)
        ranked = np.lexsort((-scores, rows))
        rank = np.arange(len(rows)) - np.repeat(starts_of(self._lengths), self._lengths)
        return np.sort(ranked[rank < np.repeat(self._counts, self._lengths)])

    def _segments(self) -> Floats:
        """[K, N, T]: means over n contiguous, nearly equal parts, token t of L being in part t·n // L."""
        part_of = (np.cumsum(self._tokens, axis=1) - 1) * self._counts[:, None] // self._lengths[:, None]
        parts = np.arange(self._counts.max())
        member = (part_of[:, None, :] == parts[:, None]) & self._tokens[:, None, :]
        weights: Floats = member / np.maximum(member.sum(axis=2, keepdims=True), np.float32(1))
        return weights.astype(np.float32)

    def _importance(self, last: Floats) -> Scores:
        """[R]: squared distance of each token from its sample's mean; ``last`` is [R, d]."""
        lengths = self._lengths[:, None].astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            mean = np.add.reduceat(last, starts_of(self._lengths), axis=0) / lengths
            distance: Scores = np.square(last - np.repeat(mean, self._lengths, axis=0)).sum(axis=1)
        return distance


def _draws(seeds: Ints, longest: int) -> npt.NDArray[np.float64]:
    """[K, T], 0 to 1: a hash (splitmix64) of the text's seed and the position, not of the padding."""
    positions = np.arange(1, longest + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = seeds.astype(np.uint64)[:, None] + positions[None, :]
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    drawn: npt.NDArray[np.float64] = (state ^ (state >> np.uint64(31))).astype(np.float64) / 2.0**64
    return drawn
