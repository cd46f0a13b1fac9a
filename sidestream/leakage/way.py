"""A way to send, and what the trainer would have of some texts sent that way.

Legend: K texts, B taps, N vectors of a text, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.sampled import Ints, Sampled, starts_of
from sidestream.contract.privacy import blurred
from sidestream.contract.sampling import EVERY_TOKEN, Sampling, parse_sampling
from sidestream.contract.tensors import Codec, Floats, decode, encode

_TOGETHER: Final = 64
SINGLE: Final = ("all", "pivot", "random", "important", "hardest")
"""Kinds of policies whose vectors are each of one token."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """What decides what a device sends of a text."""

    taps: tuple[int, ...]
    """Layers, ascending."""
    sampling: str
    """Which tokens."""
    codec: Codec
    """How quantised."""
    noise: float = 0.0
    """As :mod:`sidestream.contract.privacy` has it."""
    max_tokens: int = 128
    """Longer texts are cut."""

    @property
    def policy(self) -> Sampling:
        """The sampling, parsed."""
        return parse_sampling(self.sampling)

    def __str__(self) -> str:
        taps = ",".join(map(str, self.taps))
        return f"taps {taps} {self.sampling} {self.codec.value}" + (
            f" noise:{self.noise:g}" if self.noise else ""
        )


class Upload(NamedTuple):
    """What the trainer has of one text."""

    vectors: Floats
    """[B, N, d], decoded."""
    label: str = ""
    """Which travels beside it."""


class Seen(NamedTuple):
    """A text with what was made of it, for those who know it."""

    tokens: Ints
    """[T]."""
    places: Ints
    """[N]: which tokens the vectors are of, where each is of one; else empty."""
    clean: Floats
    """[B, N, d] as the backbone gave it, scaled to length 1 where noise is added to that."""
    sent: Floats
    """[B, N, d] as the trainer decodes it."""


def seen(backbone: Backbone, way: Way, texts: Sequence[str], rng: np.random.Generator) -> list[Seen]:
    """Forward texts as a device does, in their order.

    Random tokens are drawn by ``rng`` and not by the text's hash: alike in distribution, and where they are is known.
    """
    found: list[Seen | None] = [None] * len(texts)
    single = way.policy.kind in SINGLE
    policy = EVERY_TOKEN if single else way.policy
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in range(0, len(order), _TOGETHER):
        rows = order[start : start + _TOGETHER]
        some = [texts[row] for row in rows]
        tokens = backbone.text_input.read(some, way.max_tokens)
        sampled = backbone.sample(tokens, way.taps, policy)
        for number, (row, vectors) in enumerate(zip(rows, rows_of(sampled), strict=True)):
            places = _places(way.policy, vectors, rng, backbone.is_decoder) if single else np.empty(0, np.int64)
            if single:
                vectors = vectors[:, places]
            found[row] = Seen(
                tokens.ids[number][tokens.mask[number]], places, scaled(way, vectors), sent(way, vectors, rng)
            )
    return [one for one in found if one is not None]


def _places(policy: Sampling, every: Floats, rng: np.random.Generator, is_decoder: bool) -> Ints:
    """Which of a text's tokens [B, T, d] travel."""
    count = every.shape[1]
    if policy.kind == "all":
        return np.arange(count)
    if policy.kind == "pivot":
        return np.array([count - 1 if is_decoder else 0])
    few = int(policy.counts(np.array([count]))[0])
    scores = rng.random(count)
    if policy.kind == "important":
        scores = np.square(every[-1] - every[-1].mean(axis=0)).sum(axis=1)
    return np.sort(np.argsort(-scores, kind="stable")[:few])


def rows_of(sampled: Sampled) -> list[Floats]:
    """K of [B, N, d]."""
    return [part.copy() for part in np.split(sampled.vectors, starts_of(sampled.lengths)[1:], axis=1)]


def scaled(way: Way, vectors: Floats) -> Floats:
    """[..., d] without noise, but at the length that it would be added to."""
    if not way.noise:
        return vectors
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    found: Floats = vectors / np.maximum(lengths, np.float32(1e-12))
    return found


def sent(way: Way, vectors: Floats, rng: np.random.Generator) -> Floats:
    """[B, N, d] as the trainer decodes it."""
    return decode(encode(blurred(vectors, way.noise, rng), way.codec))
