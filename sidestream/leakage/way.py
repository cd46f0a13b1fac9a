"""A way to send, and what the trainer would have of some texts sent that way.

Legend: K texts, B taps, N vectors of a text, d width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.sampled import Ints, Sampled, starts_of
from sidestream.backbone.token_sampler import TokenSampler
from sidestream.contract.privacy import NO_PRIVACY, Privacy
from sidestream.contract.sampling import EVERY_TOKEN, Sampling, parse_sampling
from sidestream.contract.tensors import Codec, Floats, decode, encode

Tell: TypeAlias = Callable[[str], None]
"""Given lines of progress."""
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
    privacy: Privacy = NO_PRIVACY
    """What is done to vectors: sketch and noise."""
    codebooks: bytes = b""
    """In product quantisation, by which: their id."""
    max_tokens: int = 128
    """Longer texts are cut."""

    @property
    def policy(self) -> Sampling:
        """The sampling, parsed."""
        return parse_sampling(self.sampling)

    def __str__(self) -> str:
        taps = ",".join(map(str, self.taps))
        return f"taps {taps} {self.sampling} {self.codec.value}" + (
            f" {self.privacy}" if str(self.privacy) else ""
        )


class Seen(NamedTuple):
    """A text with what was made of it, for those who know it."""

    tokens: Ints
    """[T]."""
    places: Ints
    """[N]: which tokens the vectors are of, where each is of one; else empty."""
    clean: Floats
    """[B, N, d] what a device would send without noise and quantising."""
    sent: Floats
    """[B, N, d] as the trainer decodes it."""


class Whole(NamedTuple):
    """Every token of a text, at all taps that any way needs."""

    tokens: Ints
    """[T]."""
    states: npt.NDArray[np.float16]
    """[B, T, d]."""


def whole(
    backbone: Backbone,
    taps: Sequence[int],
    texts: Sequence[str],
    max_tokens: int,
    tell: Tell,
    until: float = float("inf"),
) -> list[Whole | None]:
    """Forward texts once, in their order; None of those that the time was not enough for."""
    found: list[Whole | None] = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    parts = [order[start : start + _TOGETHER] for start in range(0, len(order), _TOGETHER)]
    done = 0
    for number in np.random.default_rng(0).permutation(len(parts)):  # no length comes first
        rows = parts[number]
        tokens = backbone.text_input.read([texts[row] for row in rows], max_tokens)
        sampled = backbone.sample(tokens, taps, EVERY_TOKEN)
        for place, (row, vectors) in enumerate(zip(rows, rows_of(sampled), strict=True)):
            found[row] = Whole(tokens.ids[place][tokens.mask[place]], vectors.astype(np.float16))
        done += len(rows)
        tell(f"{done} of {len(texts)} texts through the backbone")
        if time.monotonic() > until:
            break
    return found


def seen(
    way: Way, taps: Sequence[int], texts: Sequence[Whole], rng: np.random.Generator, *, is_decoder: bool
) -> list[Seen]:
    """What a device would send of texts.

    Random tokens are drawn by ``rng`` and not by the text's hash: alike in distribution, and where they are
    is known.

    Args:
        way: How it sends.
        taps: The layers that are at hand.
        texts: What went through the backbone.
        rng: Of noise and of what is random.
        is_decoder: Whether the last token is the pivot.
    """
    index = [list(taps).index(tap) for tap in way.taps]
    found = []
    for tokens, states in texts:
        every = states[index].astype(np.float32)
        if way.policy.kind in SINGLE:
            places = _places(way.policy, every, rng, is_decoder)
            clean = way.privacy.project(every[:, places])
        else:
            places = np.empty(0, np.int64)
            sampler = TokenSampler(way.policy, np.ones((1, len(tokens)), bool), np.zeros(1, np.int64))
            for tap in every:
                sampler.take(tap[None])
            clean = way.privacy.project(sampler.sampled().vectors)
        found.append(Seen(tokens, places, clean, sent(way, clean, rng)))
    return found


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


def sent(way: Way, vectors: Floats, rng: np.random.Generator) -> Floats:
    """[B, N, d] of :meth:`Privacy.project` -> as the trainer decodes it."""

    def draw(shape: tuple[int, ...]) -> Floats:
        return rng.standard_normal(shape, np.float32)

    return decode(encode(way.privacy.noisy(vectors, draw), way.codec, way.codebooks))
