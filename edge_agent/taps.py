"""Token sampling: from every token's activation to the few vectors that travel, and back to a padded tensor.

Applies the policies that :mod:`contract.sampling` names. Everything is a gather or a batched matrix product:
no Python runs per token.

Legend: B taps, K samples, T tokens (padded), N vectors a sample (padded), V vectors of all samples, d width.
"""

from __future__ import annotations

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
        return _segments(taps.activations, lengths, sampling.count if sampling.kind == "segments" else 1)


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
