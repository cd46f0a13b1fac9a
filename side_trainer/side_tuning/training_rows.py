"""Journaled batches as training rows: decoded once, kept within a byte budget, gathered into mini-batches.

Legend: B taps, K rows of a mini-batch, N vectors a row (padded), T vectors of a batch, d a
backbone's hidden size.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from side_trainer.journal.journal import Journal, Record
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.tasks import NO_TARGET, PER_VECTOR, Targets
from sidestream.contract.tensors import Floats, decode
from sidestream.contract.wire import unpack

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StoredBatch:
    """A journaled batch, dequantised."""

    tier: str
    """Where it came from."""
    activations: Floats
    """[B, T, d]: the rows' vectors one after another."""
    starts: Ints
    """[K + 1]: row k's vectors are starts[k]…starts[k + 1]."""
    targets: Targets
    """[K, …], or [T, …] if ``per_vector``; whole numbers as int64, others as float32."""
    per_vector: bool
    """Whether every vector has a target, and not the row as a whole."""
    stream: str = ""
    """Of the device that sent it."""

    @classmethod
    def read(cls, tier: str, payload: bytes) -> StoredBatch:
        """Decode a payload that the inbox has accepted."""
        batch = unpack(ActivationBatch, payload)
        return cls.of(tier, batch, decode(batch.activations))

    @classmethod
    def of(cls, tier: str, batch: ActivationBatch, values: Floats) -> StoredBatch:
        """A batch that is decoded already, to ``values``."""
        return cls(
            tier=tier,
            activations=values,
            starts=np.concatenate([[0], np.cumsum(batch.row_lengths, dtype=np.int64)]),
            targets=_widened(batch.read_targets()),
            per_vector=batch.target_form in PER_VECTOR,
            stream=batch.stream,
        )

    @staticmethod
    def read_targets(payload: bytes) -> Targets:
        """Only the targets of a payload."""
        return _widened(unpack(ActivationBatch, payload).read_targets())

    def row_targets(self, row: int, longest: int) -> Targets:
        """One row's target; if every vector has one, [longest, …], padded with :data:`NO_TARGET`."""
        if not self.per_vector:
            target: Targets = self.targets[row]
            return target
        of_row = self.targets[self.starts[row] : self.starts[row + 1]]
        padding = np.full((longest - len(of_row), *of_row.shape[1:]), NO_TARGET, of_row.dtype)
        return np.concatenate([of_row, padding])


@dataclass(frozen=True, kw_only=True)
class FamilyRows:
    """The rows of a mini-batch that share an alignment map and a number of taps."""

    align: str
    """The map's name."""
    activations: torch.Tensor
    """[B, K', N, d], zero where padded."""


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """Rows of any tiers, family by family; ``mask`` and the rest are in that order too."""

    families: list[FamilyRows]
    """By falling number of taps, then alignment map; N is common to all."""
    mask: torch.Tensor
    """[K, N] bool: which vectors are real."""
    targets: torch.Tensor
    """[K, …], or [K, N, …] where every vector has one."""
    tiers: list[str]
    """[K] tier names."""
    per_vector: bool
    """Whether every vector has a target and an answer."""
    weights: torch.Tensor
    """[K]: what each row counts, 1 at most."""


class RowStore:
    """The rows of a journal's first batches, numbered in the order in which they were journaled.

    Args:
        journal: Where payloads are read from.
        cache_bytes: Decoded batches are kept up to so many bytes; the least recently used go first.
    """

    def __init__(self, journal: Journal, *, cache_bytes: int) -> None:
        self._journal = journal
        self._offsets = array("q")  # these and the ends ascend: 16 bytes a batch, and a search copies nothing
        self._ends = array("q")
        self._cache: OrderedDict[int, StoredBatch] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def add(self, offset: int, rows: int) -> None:
        """Number the rows of the batch at ``offset``, which follows all before it."""
        self._offsets.append(offset)
        self._ends.append(len(self) + rows)

    def rows_before(self, offset: int) -> int:
        """How many rows stand in batches before ``offset``."""
        position = bisect_left(self._offsets, offset)
        return self._ends[position - 1] if position else 0

    def batches_after(self, offset: int) -> int:
        """How many batches stand after ``offset``."""
        return len(self._offsets) - bisect_right(self._offsets, offset)

    def locate(self, rows: Ints) -> list[tuple[int, int]]:
        """Row numbers -> ``(offset, row within the batch)``."""
        positions = [bisect_right(self._ends, row) for row in rows.tolist()]
        return [
            (self._offsets[position], row - (self._ends[position - 1] if position else 0))
            for position, row in zip(positions, rows.tolist(), strict=True)
        ]

    def batch(self, offset: int) -> StoredBatch:
        """The decoded batch at ``offset``."""
        found = self._cache.get(offset)
        if found is not None:
            self._cache.move_to_end(offset)
            return found
        return self.decode(self._journal.get(offset))

    def decode(self, record: Record) -> StoredBatch:
        """The batch of a record, kept; the inbox may have decoded it already."""
        assert record.kind == "batch" and record.tier is not None
        found = self._journal.decoded.take(record.offset)
        if found is not None:
            stored = StoredBatch.of(record.tier, found.batch, found.values)
        else:
            stored = StoredBatch.read(record.tier, record.payload)
        self._cache[record.offset] = stored
        self._cached += stored.activations.nbytes
        while self._cached > self._cache_bytes and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].activations.nbytes
        return stored


def gather(
    picks: Iterable[tuple[StoredBatch, int]],
    align_of_tier: Callable[[str], str],
    weight_of_stream: Callable[[str], float] = lambda stream: 1.0,
) -> MiniBatch:
    """Pad rows of any tiers into one mini-batch, family by family."""
    families: dict[tuple[int, str], list[tuple[StoredBatch, int]]] = {}
    for stored, row in picks:
        key = (-len(stored.activations), align_of_tier(stored.tier))
        families.setdefault(key, []).append((stored, row))
    ordered = [pick for key in sorted(families) for pick in families[key]]
    lengths = np.array([stored.starts[row + 1] - stored.starts[row] for stored, row in ordered])
    longest = int(lengths.max())
    return MiniBatch(
        families=[
            FamilyRows(align=align, activations=torch.from_numpy(_pad(families[taps, align], longest)))
            for taps, align in sorted(families)
        ],
        mask=torch.from_numpy(np.arange(longest)[None, :] < lengths[:, None]),
        targets=torch.from_numpy(np.array([stored.row_targets(row, longest) for stored, row in ordered])),
        tiers=[stored.tier for stored, _ in ordered],
        per_vector=ordered[0][0].per_vector,
        weights=torch.tensor([weight_of_stream(stored.stream) for stored, _ in ordered]),
    )


class SampleCounts(NamedTuple):
    """What the batches up to an offset hold."""

    batches: int
    """How many they are."""
    samples: int
    """Samples in them."""
    unique: int
    """Distinct ones, by stream and ordinal number."""
    trained: int
    """Distinct ones in those batches that a checkpoint includes."""


def count_samples(journal: Journal, upto: int, *, trained: int) -> SampleCounts:
    """Count in one reading of the batches up to ``upto``; a checkpoint includes those up to ``trained``."""
    batches = [one for one in journal.batches(upto) if one[2]]  # others are of a later pass of a split job
    all_seen: set[tuple[str, int]] = set()
    trained_seen = 0
    for offset, _, _ in batches:
        batch = unpack(ActivationBatch, journal.get(offset).payload)
        all_seen.update((batch.stream, sample) for sample in batch.sample_ids.tolist())
        if offset <= trained:
            trained_seen = len(all_seen)
    samples = sum(count for _, _, count in batches)
    return SampleCounts(len(batches), samples, len(all_seen), trained_seen)


def _widened(targets: Targets) -> Targets:
    """In the types that torch has."""
    return targets.astype(np.int64 if targets.dtype.kind in "iu" else np.float32)


def _pad(picks: list[tuple[StoredBatch, int]], longest: int) -> npt.NDArray[Any]:
    """Rows of one width -> [B, K', N, d]."""
    taps, _, width = picks[0][0].activations.shape
    padded = np.zeros((taps, len(picks), longest, width), np.float32)
    for index, (stored, row) in enumerate(picks):
        start, end = stored.starts[row], stored.starts[row + 1]
        padded[:, index, : end - start] = stored.activations[:, start:end]
    return padded
