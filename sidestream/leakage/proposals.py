"""Linear guesses at tokens: maps from an upload to what its tokens would add up to, fitted on public text.

A token's *signature* is what the first tapped layer makes of it when it stands alone. A vector that is a mean
over tokens resembles the mean of their signatures; which signatures those are is found one after another.

Legend: n vectors of a sentence, F numbers of each, P positions, V vocabulary, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from sidestream.backbone.sampled import Ints
from sidestream.contract.tensors import Floats
from sidestream.leakage.encoding import Encoding, Way
from sidestream.leakage.language import Language

_RIDGE: Final = 1e-2
_SHRINK: Final = 0.1


class Proposals:
    """Fitted on public uploads.

    Args:
        encoding: The way to upload.
        language: Of the public text.
        sentences: The public text, token ids.
        uploads: Of these, [n, F] each.
        signatures: [V, d].
    """

    def __init__(
        self,
        encoding: Encoding,
        language: Language,
        sentences: Sequence[Ints],
        uploads: Sequence[Floats],
        signatures: Floats,
    ) -> None:
        self.way: Way = encoding.way
        self.language = language
        rows = np.concatenate(uploads)
        self._middle, self._scale = rows.mean(axis=0), rows.std(axis=0) + 1e-6
        self.signatures: Floats = signatures - signatures.mean(axis=0)
        targets, counts = self._targets(sentences)
        features = self.standard(rows)
        self._map, self._offset = _ridge(features, targets)
        errors = (features @ self._map + self._offset - targets) * np.sqrt(counts)[:, None]
        self._whiten(errors)
        self._fit_lengths(sentences, uploads)

    def standard(self, rows: Floats) -> Floats:
        """[n, F] uploads, each number by its mean and spread over the public text."""
        return (rows - self._middle) / self._scale

    def unstandard(self, rows: Floats) -> Floats:
        """The inverse of :meth:`standard`."""
        return rows * self._scale + self._middle

    def _targets(self, sentences: Sequence[Ints]) -> tuple[Floats, Ints]:
        targets, counts = [], []
        for one in sentences:
            homes = self.way.homes(len(one))
            count = np.bincount(homes)
            total = np.zeros((len(count), self.signatures.shape[1]), np.float32)
            np.add.at(total, homes, self.signatures[one])
            targets.append(total / count[:, None])
            counts.append(count)
        return np.concatenate(targets), np.concatenate(counts)

    def _whiten(self, errors: Floats) -> None:
        """Distances between signatures are measured by how well each direction can be told."""
        spread = errors.T @ errors / len(errors)
        spread[np.diag_indices_from(spread)] += _SHRINK * np.trace(spread) / len(spread)
        self._white = np.linalg.cholesky(np.linalg.inv(spread)).astype(np.float32)
        self._seen: Floats = self.signatures @ self._white  # [V, d]
        self._norms: Floats = np.square(self._seen).sum(axis=1)

    def _fit_lengths(self, sentences: Sequence[Ints], uploads: Sequence[Floats]) -> None:
        lengths = np.array([len(one) for one in sentences])
        self._full = max(len(one) for one in uploads)
        full = np.array([len(one) == self._full for one in uploads])
        self._longest = int(np.percentile(lengths, 99.5)) + 2
        if self.way.sampling.kind == "all":
            return
        kept = [self.standard(one).ravel() for one, take in zip(uploads, full, strict=True) if take]
        matrix = np.stack(kept)
        self._length_map, self._length_offset = _ridge(matrix, lengths[full][:, None].astype(np.float32), 0.1)

    def lengths(self, upload: Floats, count: int) -> list[int]:
        """How many tokens the sentence may have, the likeliest first."""
        vectors = len(upload)
        if self.way.sampling.kind == "all" or vectors < self._full:
            return [vectors]
        guess = float((self.standard(upload).ravel() @ self._length_map + self._length_offset)[0])
        nearest = sorted(range(max(3, vectors), self._longest + 1), key=lambda one: abs(one - guess))
        return nearest[:count]

    def estimate(self, standard: Floats) -> Floats:
        """[n, d]: the mean signature of each vector's tokens."""
        return standard @ self._map + self._offset

    def change(self, difference: Floats) -> Floats:
        """[n, d]: by how much the mean signatures differ where standardised uploads do by so much."""
        return difference @ self._map

    def scores(self, sums: Floats, counts: Ints) -> Floats:
        """[P, V]: how well each token explains what is left of a vector's sum, and how frequent it is.

        Args:
            sums: [P, d]: what is left.
            counts: [P]: tokens of the vector, by which its error grows.
        """
        seen = np.float32(2) * (sums.astype(np.float32) @ self._white)
        each = counts[:, None].astype(np.float32)
        scores: Floats = (seen @ self._seen.T - self._norms) / each + np.float32(2) * self.language.logs
        return scores

    def greedy(self, upload: Floats, length: int, first: Sequence[int], last: Sequence[int]) -> Ints:
        """[T]: token after token of each vector, the best first."""
        homes = self.way.homes(length)
        counts = np.bincount(homes)
        left = self.estimate(self.standard(upload)) * counts[:, None]
        sentence = np.full(length, -1)
        sentence[: len(first)] = first
        sentence[length - len(last) :] = last
        for place in np.flatnonzero(sentence >= 0):
            left[homes[place]] -= self.signatures[sentence[place]]
        for place in np.flatnonzero(sentence < 0):
            home = homes[place]
            token = int(self.scores(left[home : home + 1], counts[home : home + 1])[0].argmax())
            sentence[place] = token
            left[home] -= self.signatures[token]
        return sentence


def _ridge(features: Floats, targets: Floats, strength: float = _RIDGE) -> tuple[Floats, Floats]:
    """A linear map and its offset, by least squares; features are centred already."""
    middle, offset = features.mean(axis=0), targets.mean(axis=0)
    centred, wanted = features - middle, targets - offset
    few = len(features) < features.shape[1]
    gram = (centred @ centred.T if few else centred.T @ centred).astype(np.float64)
    gram[np.diag_indices_from(gram)] += strength * len(features)
    solved = np.linalg.solve(gram, wanted if few else centred.T @ wanted)
    weights = (centred.T @ solved if few else solved).astype(np.float32)
    return weights, (offset - middle @ weights).astype(np.float32)
