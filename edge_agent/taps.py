"""Token sampling: from every token's activation to the few vectors that travel, and back to a padded tensor.

Applies the policies that :mod:`contract.sampling` names. Everything is a gather or a batched matrix product:
no Python runs per token.

A token's *importance* is how far it lies from the rest of its sample: the L2 distance between its vector and
the mean of the sample's real tokens, at the last tapped layer. It needs nothing but the activations.

Legend: B taps, K samples, T tokens (padded), N vectors a sample (padded), V vectors of all samples, d width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from contract.sampling import Sampling
from contract.tensors import Floats


@dataclass(frozen=True, kw_only=True)
class Taps:
    """Activations read at the tapped layers in one forward pass."""

    activations: Tensor
    """[B, K, T, d] float32."""
    mask: Tensor
    """[K, T] bool: real tokens, at least one in each row, on its left."""
    seconds: float
    """What the pass took, tokenising included."""
    seeds: Tensor
    """[K] int64 of :func:`seeds_of`, one for each text: what random sampling draws by."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Sampled activations, padded: what the side-network takes."""

    values: Tensor
    """[B, K, N, d] float32; zeros where the mask is false."""
    mask: Tensor
    """[K, N] bool: real vectors, at least one in each row, on its left."""

    def ragged(self) -> tuple[Floats, npt.NDArray[np.int64]]:
        """What the wire takes: the real vectors [B, V, d], sample after sample, and how many each has [K]."""
        vectors: Floats = self.values[:, self.mask].numpy()
        lengths: npt.NDArray[np.int64] = self.mask.sum(dim=1).numpy()
        return vectors, lengths

    def finite_rows(self) -> Tensor:
        """[K] bool: rows without NaN or infinity."""
        return torch.isfinite(self.values).all(dim=3).all(dim=2).all(dim=0)

    def select(self, rows: Tensor) -> Sampled:
        """Only some of the rows: [K] bool, or their indices."""
        return Sampled(values=self.values[:, rows], mask=self.mask[rows])


def sample_tokens(taps: Taps, sampling: Sampling, *, is_decoder: bool) -> Sampled:
    """Apply a policy; the pivot is the first token of an encoder and the last real one of a decoder."""
    lengths = taps.mask.sum(dim=1)  # [K]
    with torch.inference_mode():
        if sampling.kind == "all":
            return Sampled(values=_cleared(taps.activations, taps.mask), mask=taps.mask)
        if sampling.kind == "pivot":
            return _pivot(taps.activations, lengths - 1 if is_decoder else torch.zeros_like(lengths))
        if sampling.kind == "random":
            return _best(taps.activations, lengths, _draws(taps), sampling.count)
        if sampling.kind == "important":
            return _best(taps.activations, lengths, _importance(taps), sampling.count)
        return _segments(taps.activations, lengths, sampling.count)


def seeds_of(texts: Sequence[str]) -> Tensor:
    """[K] int64: a hash of each text, the same on every machine and in every run."""
    digests = [hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest() for text in texts]
    return torch.from_numpy(np.frombuffer(b"".join(digests), "<i8").astype(np.int64))


def pad(vectors: Floats, lengths: npt.NDArray[np.int64]) -> Sampled:
    """The inverse of :meth:`Sampled.ragged`: [B, V, d] and [K] -> [B, K, N, d] and its mask."""
    counts = torch.from_numpy(np.asarray(lengths, dtype=np.int64))
    mask = torch.arange(int(counts.max()))[None, :] < counts[:, None]  # [K, N]
    values = torch.zeros(vectors.shape[0], *mask.shape, vectors.shape[2])
    values[:, mask] = torch.from_numpy(vectors)
    return Sampled(values=values, mask=mask)


def _pivot(activations: Tensor, positions: Tensor) -> Sampled:
    rows = torch.arange(activations.shape[1])
    values = activations[:, rows, positions][:, :, None]  # [B, K, 1, d]
    return Sampled(values=values, mask=torch.ones(len(rows), 1, dtype=torch.bool))


def _draws(taps: Taps) -> Tensor:
    """[K, T] float64, 0 to 1: a hash (splitmix64) of the text's seed and the position, not of the padding."""
    positions = np.arange(1, taps.mask.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = taps.seeds.numpy().astype(np.uint64)[:, None] + positions[None, :]
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((state ^ (state >> np.uint64(31))).astype(np.float64) / 2.0**64)


def _importance(taps: Taps) -> Tensor:
    """[K, T]: squared distance of each token from its sample's mean at the last tap."""
    last = taps.activations[-1].masked_fill(~taps.mask[:, :, None], 0.0)  # [K, T, d]
    mean = last.sum(dim=1, keepdim=True) / taps.mask.sum(dim=1)[:, None, None]
    # What is not finite comes first, so that its row is found and skipped.
    return (last - mean).square().sum(dim=2).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _best(activations: Tensor, lengths: Tensor, scores: Tensor, most: int) -> Sampled:
    """The min(most, L) real tokens of each row with the highest scores [K, T], in the order of the text."""
    counts = lengths.clamp(max=most)  # [K]
    real = torch.arange(scores.shape[1])[None, :] < lengths[:, None]  # [K, T]
    chosen = scores.masked_fill(~real, -torch.inf).topk(int(counts.max()), dim=1).indices
    positions = chosen.sort(dim=1).values  # [K, N]; padding stands on the right, so it comes last
    mask = torch.arange(positions.shape[1])[None, :] < counts[:, None]
    values = activations[:, torch.arange(len(positions))[:, None], positions]  # [B, K, N, d]
    return Sampled(values=_cleared(values, mask), mask=mask)


def _segments(activations: Tensor, lengths: Tensor, most: int) -> Sampled:
    """Means over n = min(most, L) contiguous, nearly equal parts: token t of L lies in part t·n // L."""
    parts = lengths.clamp(max=most)  # [K]
    positions = torch.arange(activations.shape[2])[None, :]  # [1, T]
    real = positions < lengths[:, None]  # [K, T]
    part_of = torch.where(real, positions * parts[:, None] // lengths[:, None], -1)
    member = part_of[:, None, :] == torch.arange(int(parts.max()))[None, :, None]  # [K, N, T]
    counts = member.sum(dim=2, keepdim=True)  # [K, N, 1]
    weights = member.float() / counts.clamp(min=1)
    values = torch.stack([torch.bmm(weights, tap) for tap in _cleared(activations, real)])
    return Sampled(values=values, mask=counts[:, :, 0] > 0)


def _cleared(activations: Tensor, real: Tensor) -> Tensor:
    """Zeros under the mask, whatever padding tokens gave."""
    return activations.masked_fill(~real[None, :, :, None], 0.0)
