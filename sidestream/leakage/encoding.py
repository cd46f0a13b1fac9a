"""One way to upload, as whoever attacks it runs it again: token ids in, what the trainer would decode out.

Legend: K sentences, T tokens of one, n vectors of one, B taps, d width, F = B·d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.sampled import Ints
from sidestream.backbone.text_input import Tokens
from sidestream.contract.privacy import NO_PRIVACY, Privacy
from sidestream.contract.sampling import Sampling
from sidestream.contract.tensors import Codec, Floats, decode, encode

_AT_ONCE: Final = 64  # sentences of a pass
_TOKENS_AT_ONCE: Final = 2048  # of the vocabulary


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a tier sends."""

    taps: tuple[int, ...]
    """Layers."""
    sampling: Sampling
    """Which vectors."""
    codec: Codec
    """How they are quantised."""
    privacy: Privacy = NO_PRIVACY
    """What the device does to them before."""

    @property
    def placed(self) -> bool:
        """Whether it is known from which tokens each vector is, so that candidates can be run again."""
        return self.sampling.kind in ("pivot", "mean", "segments", "all")

    def counts(self, length: int) -> int:
        """Vectors of a sentence with so many tokens."""
        return int(self.sampling.counts(np.array([length]))[0])

    def homes(self, length: int) -> Ints:
        """[T]: which vector each token of a sentence goes into."""
        return np.arange(length) * self.counts(length) // length


class Encoding:
    """Uploads of token ids, by one way.

    Args:
        backbone: The public backbone.
        way: How a tier sends.
    """

    def __init__(self, backbone: Backbone, way: Way) -> None:
        self.backbone, self.way = backbone, way

    def clean(self, sentences: Sequence[Ints]) -> list[Floats]:
        """[n, F] a sentence: without noise, and as they were before they are quantised."""
        return [_flat(self.way.privacy.project(one)) for one in self._vectors(sentences)]

    def sent(self, sentences: Sequence[Ints]) -> list[Floats]:
        """[n, F] a sentence: what the trainer decodes."""
        return [self._coded(one) for one in self._vectors(sentences)]

    def both(self, sentences: Sequence[Ints]) -> tuple[list[Floats], list[Floats]]:
        """:meth:`clean` and :meth:`sent`, by one forward pass."""
        raw = self._vectors(sentences)
        return [_flat(self.way.privacy.project(one)) for one in raw], [self._coded(one) for one in raw]

    def recoded(self, flat: Floats) -> Floats:
        """[n, F] as :meth:`clean` gave it -> as it is decoded, where the device adds no noise."""
        vectors = flat.reshape(len(flat), len(self.way.taps), -1).transpose(1, 0, 2)
        return _flat(decode(encode(vectors, self.way.codec)))

    def _coded(self, one: Floats) -> Floats:
        return _flat(decode(encode(self.way.privacy.apply(one), self.way.codec)))

    def _vectors(self, sentences: Sequence[Ints]) -> list[Floats]:
        """[B, n, d] a sentence."""
        found: list[Floats] = []
        for start in range(0, len(sentences), _AT_ONCE):
            rows = [one.tolist() for one in sentences[start : start + _AT_ONCE]]
            tokens = self.backbone.text_input.padded(rows)
            sampled = self.backbone.forward_tokens(tokens, self.way.taps, self.way.sampling)
            found += np.split(sampled.vectors, np.cumsum(sampled.lengths)[:-1], axis=1)
        return found

    def signatures(self, vocabulary: int, first: Sequence[int], last: Sequence[int]) -> Floats:
        """[vocabulary, d]: what the first tapped layer makes of each token alone, between these."""
        parts = []
        for start in range(0, vocabulary, _TOKENS_AT_ONCE):
            ids = np.arange(start, min(vocabulary, start + _TOKENS_AT_ONCE))
            rows = np.stack([np.full_like(ids, one) for one in first] + [ids], axis=1)
            rows = np.concatenate([rows, np.tile(np.array(last, int), (len(ids), 1))], axis=1)
            states = self.backbone.states(Tokens(rows, np.ones(rows.shape, bool)), self.way.taps[0])
            parts.append(states.reshape(*rows.shape, -1)[:, len(first)])
        return np.concatenate(parts)


def _flat(one: Floats) -> Floats:
    """[B, n, d] -> [n, F]."""
    return one.transpose(1, 0, 2).reshape(one.shape[1], -1)
