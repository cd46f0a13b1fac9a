"""Token sampling: from every token's activation to the few vectors that travel, and back to a padded tensor.

Applies the policies that :mod:`sidestream.contract.sampling` names. Everything is a gather or a batched
matrix product: no Python runs per token.

A token's *importance* is how far it lies from the rest of its sample: the L2 distance between its vector and
the mean of the sample's real tokens, at the last tapped layer. It needs nothing but the activations.

Legend: B taps, K samples, T tokens (padded), N vectors a sample (padded), V vectors of all samples, d width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sidestream.backbone.text import Text
from sidestream.contract.sampling import Sampling
from sidestream.contract.tasks import NO_TARGET
from sidestream.contract.tensors import Floats


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Sampled activations, padded: what the side-network takes."""

    values: Tensor
    """[B, K, N, d] float32; zeros where the mask is false."""
    mask: Tensor
    """[K, N] bool: real vectors, at least one in each row, on its left."""
    words: Tensor | None = None
    """[K, N] int64, where every word has a vector: which word it is; -1 for none."""
    seconds: float = 0.0
    """What the forward pass took, tokenising and sampling included."""
    targets: Tensor | None = None
    """[K, N] int64, in a language model: the token that follows; :data:`NO_TARGET` under the mask."""
    owners: npt.NDArray[np.int64] | None = None
    """[K] where rows were cut into several: whose each one is, as an index into what was computed."""

    def ragged(self) -> tuple[Floats, npt.NDArray[np.int64]]:
        """What the wire takes: the real vectors [B, V, d], sample after sample, and how many each has [K]."""
        vectors: Floats = self.values[:, self.mask].numpy()
        lengths: npt.NDArray[np.int64] = self.mask.sum(dim=1).numpy()
        return vectors, lengths

    def usable_rows(self) -> Tensor:
        """[K] bool: rows without NaN or infinity, and with a word where words are wanted."""
        finite = torch.isfinite(self.values).all(dim=3).all(dim=2).all(dim=0)
        return finite if self.words is None else finite & (self.words[:, 0] >= 0)

    def select(self, rows: Tensor) -> Sampled:
        """Only some of the rows: [K] bool, or their indices."""
        words = None if self.words is None else self.words[rows]
        targets = None if self.targets is None else self.targets[rows]
        return replace(self, values=self.values[:, rows], mask=self.mask[rows], words=words, targets=targets)


@dataclass(frozen=True, kw_only=True)
class Words:
    """Where the words of some texts stand: each by its first token, or, in a decoder, by its last."""

    positions: Tensor
    """[K, N] int64: tokens that stand for words; 0 where padded."""
    mask: Tensor
    """[K, N] bool: which are real, one a row at least, even if its text has no word."""
    numbers: Tensor
    """[K, N] int64: the words' numbers in their text; -1 for none."""

    @classmethod
    def of(cls, numbers: Sequence[npt.NDArray[np.int64]], *, is_decoder: bool) -> Words:
        """From :func:`word_numbers` of each text; only a word's last token has seen all of it."""
        chosen = [_word_places(one, last=is_decoder) for one in numbers]
        lengths = torch.tensor([len(places) for places in chosen])
        found = [torch.from_numpy(one[places]) for one, places in zip(numbers, chosen, strict=True)]
        return cls(
            positions=nn.utils.rnn.pad_sequence([torch.from_numpy(one) for one in chosen], batch_first=True),
            mask=torch.arange(int(lengths.max()))[None, :] < lengths[:, None],
            numbers=nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1),
        )


class TokenSampler:
    """Samples tap after tap as a forward pass comes to them, so that no other token's activation is kept.

    Only the ``important`` policy keeps all of them to the end: the last tap decides.

    Args:
        sampling: The policy.
        mask: [K, T] bool: real tokens, at least one in each row, on its left.
        seeds: [K] int64 of :func:`seeds_of`, one for each text: what random sampling draws by.
        is_decoder: Whether the pivot is the last real token; it is the first one of an encoder.
        words: Take these tokens instead.
    """

    def __init__(
        self,
        sampling: Sampling,
        mask: Tensor,
        seeds: Tensor,
        *,
        is_decoder: bool,
        words: Words | None = None,
    ) -> None:
        self._lengths = mask.sum(dim=1)  # [K]
        self._padding = None if bool(mask.all()) else ~mask[:, :, None]  # [K, T, 1]
        self._taken: list[Tensor] = []
        self._weights: Tensor | None = None
        self._positions: Tensor | None = None
        self._undecided = sampling.count if sampling.kind == "important" else 0
        self._mask = mask
        self._words = None if words is None else words.numbers
        if words is not None:
            self._positions, self._mask = words.positions, words.mask
        elif sampling.kind == "pivot":
            last = self._lengths - 1 if is_decoder else torch.zeros_like(self._lengths)
            self._positions, self._mask = last[:, None], torch.ones(len(mask), 1, dtype=torch.bool)
        elif sampling.kind == "random":
            self._positions, self._mask = _best(_draws(mask, seeds), self._lengths, sampling.count)
        elif sampling.kind in ("mean", "segments"):
            self._weights, self._mask = _segments(mask, self._lengths, sampling.count)

    def take(self, tap: Tensor) -> None:
        """The next tap, [K, T, d] in any float type; nothing of it is kept but what is sampled."""
        self._taken.append(self._sample(tap))

    def sampled(self) -> Sampled:
        """What was sampled of the taps taken."""
        if self._undecided:
            scores = _importance(self._cleared(self._taken[-1].float()), self._lengths)
            self._positions, self._mask = _best(scores, self._lengths, self._undecided)
            self._undecided = 0
            self._taken = [self._sample(tap) for tap in self._taken]
        return Sampled(values=torch.stack(self._taken), mask=self._mask, words=self._words)

    def _sample(self, tap: Tensor) -> Tensor:
        """[K, T, d] -> [K, N, d] float32."""
        if self._undecided:
            return tap
        if self._weights is not None:
            return torch.bmm(self._weights, self._cleared(tap.float()))
        if self._positions is None:
            return self._cleared(tap.float())
        values = tap[torch.arange(len(tap))[:, None], self._positions].float()
        return values if self._mask.all() else values.masked_fill(~self._mask[:, :, None], 0.0)

    def _cleared(self, tap: Tensor) -> Tensor:
        """Zeros under the mask, whatever padding tokens gave."""
        return tap if self._padding is None else tap.masked_fill(self._padding, 0.0)


class TargetSampler:
    """As :class:`TokenSampler`, of those tokens only that have a target.

    Args:
        sampling: The policy, one of :data:`sidestream.contract.sampling.TOKEN_KINDS`.
        targets: [K, T] int64: the token that follows; :data:`NO_TARGET` where none is to be predicted, and
            for one at least in each row there is one.
        seeds: [K] int64 of :func:`seeds_of`.
        losses: Given states of the last tap [M, d] and their targets [M]: how badly these are predicted, [M].
    """

    def __init__(
        self, sampling: Sampling, targets: Tensor, seeds: Tensor, losses: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._targets = targets
        self._real = targets != NO_TARGET
        self._counts = torch.from_numpy(sampling.counts(self._real.sum(dim=1).numpy()))
        self._losses = losses
        self._taken: list[Tensor] = []
        self._positions: Tensor | None = None
        if sampling.kind == "all":
            self._choose(torch.zeros(targets.shape))
        elif sampling.kind == "random":
            self._choose(_draws(self._real, seeds))

    def take(self, tap: Tensor) -> None:
        """The next tap, [K, T, d] in any float type; where it can be, all but what is sampled is dropped."""
        self._taken.append(tap if self._positions is None else self._sample(tap))

    def sampled(self) -> Sampled:
        """What was sampled of the taps taken."""
        if self._positions is None:
            scores = torch.zeros(self._targets.shape)
            # What is not finite comes first, so that its row is found and skipped.
            losses = self._losses(self._taken[-1][self._real].float(), self._targets[self._real])
            scores[self._real] = losses.nan_to_num(nan=torch.inf)
            self._choose(scores)
            self._taken = [self._sample(tap) for tap in self._taken]
        assert self._positions is not None
        targets = self._targets.gather(1, self._positions).masked_fill(~self._mask, NO_TARGET)
        return Sampled(values=torch.stack(self._taken), mask=self._mask, targets=targets)

    def _choose(self, scores: Tensor) -> None:
        """The tokens with the highest scores [K, T], in the order of the text."""
        most, longest = int(self._counts.max()), scores.shape[1]
        ranked = scores.masked_fill(~self._real, -torch.inf).topk(most, dim=1).indices
        chosen = torch.arange(most)[None, :] < self._counts[:, None]
        positions = ranked.masked_fill(~chosen, longest).sort(dim=1).values  # [K, N]
        self._mask = positions < longest
        self._positions = positions.clamp(max=longest - 1)

    def _sample(self, tap: Tensor) -> Tensor:
        """[K, T, d] -> [K, N, d] float32."""
        assert self._positions is not None
        values = tap[torch.arange(len(tap))[:, None], self._positions].float()
        return values.masked_fill(~self._mask[:, :, None], 0.0)


def word_numbers(text: str, offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Which word each token belongs to, by its last character; -1 for none.

    Args:
        text: The words with a single space between.
        offsets: For each token where in ``text`` it begins, and where it ends.
    """
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.cumsum([len(word) + 1 for word in text.split(" ")]) - 1  # of words, exclusive
    numbers = np.searchsorted(ends, spans[:, 1] - 1, side="right")
    return np.where(spans[:, 1] > spans[:, 0], numbers, -1)


def seeds_of(texts: Sequence[Text]) -> Tensor:
    """[K] int64: a hash of each text, the same on every machine and in every run."""
    joined = [text if isinstance(text, str) else "\0".join(text) for text in texts]
    digests = [hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest() for text in joined]
    return torch.from_numpy(np.frombuffer(b"".join(digests), "<i8").astype(np.int64))


def pad(vectors: Floats, lengths: npt.NDArray[np.int64]) -> Sampled:
    """The inverse of :meth:`Sampled.ragged`: [B, V, d] and [K] -> [B, K, N, d] and its mask."""
    counts = torch.from_numpy(np.asarray(lengths, dtype=np.int64))
    mask = torch.arange(int(counts.max()))[None, :] < counts[:, None]  # [K, N]
    values = torch.zeros(vectors.shape[0], *mask.shape, vectors.shape[2])
    values[:, mask] = torch.from_numpy(vectors)
    return Sampled(values=values, mask=mask)


def _word_places(numbers: npt.NDArray[np.int64], *, last: bool) -> npt.NDArray[np.int64]:
    """Each word's first or last token, in the order of the text; the first of all where there is no word."""
    _, first = np.unique(numbers[::-1] if last else numbers, return_index=True)
    places = np.sort(len(numbers) - 1 - first if last else first)
    places = places[numbers[places] >= 0]
    return places if len(places) else np.zeros(1, np.int64)


def _draws(mask: Tensor, seeds: Tensor) -> Tensor:
    """[K, T] float64, 0 to 1: a hash (splitmix64) of the text's seed and the position, not of the padding."""
    positions = np.arange(1, mask.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = seeds.numpy().astype(np.uint64)[:, None] + positions[None, :]
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((state ^ (state >> np.uint64(31))).astype(np.float64) / 2.0**64)


def _importance(last: Tensor, lengths: Tensor) -> Tensor:
    """[K, T]: squared distance of each token from its sample's mean; ``last`` [K, T, d], cleared."""
    mean = last.sum(dim=1, keepdim=True) / lengths[:, None, None]
    # What is not finite comes first, so that its row is found and skipped.
    return (last - mean).square().sum(dim=2).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _best(scores: Tensor, lengths: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Of the min(most, L) real tokens with the highest scores [K, T]: positions, and which are real, [K, N].

    In the order of the text.
    """
    counts = lengths.clamp(max=most)  # [K]
    real = torch.arange(scores.shape[1])[None, :] < lengths[:, None]  # [K, T]
    chosen = scores.masked_fill(~real, -torch.inf).topk(int(counts.max()), dim=1).indices
    positions = chosen.sort(dim=1).values  # [K, N]; padding stands on the right, so it comes last
    return positions, torch.arange(positions.shape[1])[None, :] < counts[:, None]


def _segments(mask: Tensor, lengths: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Means over n = min(most, L) contiguous, nearly equal parts, token t of L in part t·n // L.

    Returns:
        Weights of the tokens, [K, N, T], and which parts are real, [K, N].
    """
    parts = lengths.clamp(max=most)  # [K]
    part_of = torch.arange(mask.shape[1])[None, :] * parts[:, None] // lengths[:, None]
    part_of = part_of.masked_fill(~mask, -1)  # [K, T]
    member = part_of[:, None, :] == torch.arange(int(parts.max()))[None, :, None]  # [K, N, T]
    counts = member.sum(dim=2, keepdim=True)  # [K, N, 1]
    return member.float() / counts.clamp(min=1), counts[:, :, 0] > 0
