"""Journaled batches as training rows: decoded while there is room, as they were written beyond that.

So a small job's rows are decoded once, however often they are drawn; of a large one memory holds several
times the rows that it would hold decoded, and a row that is drawn costs itself, not the batch it came in.

Legend: B taps, K rows of a mini-batch, N vectors a row (padded), T vectors of a batch, d a
backbone's hidden size.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from side_trainer.journal.journal import Journal, Record
from sidestream.accelerator.torch_device import Placement
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.tasks import NO_TARGET, PER_VECTOR, Targets
from sidestream.contract.tensors import Bytes, Codec, Floats, Tensor, by_vector, decode, encode, separable
from sidestream.contract.wire import unpack

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredBatch:
    """A journaled batch, vector by vector as it was written, or as float32."""

    tier: str
    """Where it came from."""
    codec: Codec
    """How they are written,"""
    values: Bytes
    """[B, T, n] bytes of the rows' vectors one after another,"""
    scales: Bytes
    """[B, T, m] and of their scales,"""
    codebooks: bytes | msgspec.UnsetType
    """by these codebooks, if by any,"""
    width: int
    """and d."""
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
        """Of a payload that the inbox has accepted."""
        return cls.of(tier, unpack(ActivationBatch, payload))

    @classmethod
    def of(cls, tier: str, batch: ActivationBatch) -> StoredBatch:
        """Of a message."""
        written = batch.activations
        if not separable(written):
            written = encode(decode(written), Codec.F32)
        values, scales = by_vector(written)
        return cls(
            tier=tier,
            codec=written.codec,
            values=values,
            scales=scales,
            codebooks=written.codebooks,
            width=written.shape[-1],
            starts=np.concatenate([[0], np.cumsum(batch.row_lengths, dtype=np.int64)]),
            targets=_widened(batch.read_targets()),
            per_vector=batch.target_form in PER_VECTOR,
            stream=batch.stream,
        )

    @property
    def taps(self) -> int:
        """How many layers it has, B."""
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """What its arrays take."""
        return self.values.nbytes + self.scales.nbytes + self.starts.nbytes + self.targets.nbytes

    @property
    def decoded_nbytes(self) -> int:
        """What it would take decoded."""
        vectors = 4 * self.taps * int(self.values.shape[1]) * self.width
        return vectors + self.starts.nbytes + self.targets.nbytes

    def decode(self) -> Floats:
        """Its vectors, [B, T, d]."""
        return _decoded([(self, 0, self.values.shape[1])])

    def decoded(self) -> StoredBatch:
        """The same, written as float32."""
        values, scales = by_vector(encode(self.decode(), Codec.F32))
        return replace(self, codec=Codec.F32, values=values, scales=scales, codebooks=msgspec.UNSET)

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
    batches: list[StoredBatch] = field(default_factory=list)
    """[K]: what each row came in, if it came in any."""

    def sent(self, place: Placement) -> MiniBatch:
        """The same where the network is."""
        return replace(
            self,
            families=[replace(one, activations=place.send(one.activations)) for one in self.families],
            mask=place.send(self.mask),
            targets=place.send(self.targets),
            weights=place.send(self.weights),
        )


class RowStore:
    """The rows of a journal's first batches, numbered in the order in which they were journaled.

    Args:
        journal: Where payloads are read from.
        cache_bytes: Batches are kept up to so many bytes; the least recently used go first. Half of it may be
            of decoded ones.
    """

    def __init__(self, journal: Journal, *, cache_bytes: int) -> None:
        self._journal = journal
        self._offsets = array("q")  # these and the ends ascend: 16 bytes a batch, and a search copies nothing
        self._ends = array("q")
        self._cache: OrderedDict[int, StoredBatch] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached = self._decoded = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def add(self, offset: int, rows: int) -> None:
        """Number the rows of the batch at ``offset``, which follows all before it."""
        self._offsets.append(offset)
        self._ends.append(len(self) + rows)

    def reset(self, batches: Sequence[tuple[int, int]]) -> None:
        """Number the rows of these batches, and of no others."""
        self._offsets, self._ends = array("q"), array("q")
        if batches:
            offsets, rows = np.array(batches, np.int64).T
            self._ends.frombytes((len(self) + np.cumsum(rows)).tobytes())
            self._offsets.frombytes(offsets.tobytes())

    def drop_before(self, offset: int) -> int:
        """Forget the batches before ``offset``; return how many rows they had. The rest are numbered anew."""
        position = bisect_left(self._offsets, offset)
        rows = self.rows_before(offset)
        for gone in self._offsets[:position]:
            if (stored := self._cache.pop(gone, None)) is not None:
                self._count(stored, -1)
        del self._offsets[:position]
        self._ends = array("q", (end - rows for end in self._ends[position:]))
        return rows

    def rows_before(self, offset: int) -> int:
        """How many rows stand in batches before ``offset``."""
        position = bisect_left(self._offsets, offset)
        return self._ends[position - 1] if position else 0

    def locate(self, rows: Ints) -> list[tuple[int, int]]:
        """Row numbers -> ``(offset, row within the batch)``."""
        positions = [bisect_right(self._ends, row) for row in rows.tolist()]
        return [
            (self._offsets[position], row - (self._ends[position - 1] if position else 0))
            for position, row in zip(positions, rows.tolist(), strict=True)
        ]

    def batch(self, offset: int) -> StoredBatch:
        """The batch at ``offset``."""
        found = self._cache.get(offset)
        if found is not None:
            self._cache.move_to_end(offset)
            return found
        return self.read(self._journal.get(offset))

    def read(self, record: Record) -> StoredBatch:
        """The batch of a record, kept; the inbox may have unpacked it already."""
        assert record.kind == "batch" and record.tier is not None
        found = self._journal.decoded.take(record.offset)
        batch = found.batch if found is not None else unpack(ActivationBatch, record.payload)
        stored = StoredBatch.of(record.tier, batch)
        if self._decoded + stored.decoded_nbytes <= self._cache_bytes // 2:
            stored = stored.decoded()
        self._cache[record.offset] = stored
        self._count(stored, 1)
        while self._cached > self._cache_bytes and len(self._cache) > 1:
            self._count(self._cache.popitem(last=False)[1], -1)
        return stored

    def _count(self, stored: StoredBatch, sign: int) -> None:
        self._cached += sign * stored.nbytes
        self._decoded += sign * stored.nbytes * (stored.codec is Codec.F32)


def gather(
    picks: Iterable[tuple[StoredBatch, int]],
    align_of_tier: Callable[[str], str],
    weight_of_stream: Callable[[str], float] = lambda stream: 1.0,
) -> MiniBatch:
    """Pad rows of any tiers into one mini-batch, family by family."""
    families: dict[tuple[int, str], list[tuple[StoredBatch, int]]] = {}
    for stored, row in picks:
        key = (-stored.taps, align_of_tier(stored.tier))
        families.setdefault(key, []).append((stored, row))
    ordered = [pick for key in sorted(families) for pick in families[key]]
    lengths = np.array([stored.starts[row + 1] - stored.starts[row] for stored, row in ordered])
    longest = int(lengths.max())
    mask = np.arange(longest)[None, :] < lengths[:, None]
    return MiniBatch(
        families=[
            FamilyRows(align=align, activations=torch.from_numpy(_padded(families[taps, align], longest)))
            for taps, align in sorted(families)
        ],
        mask=torch.from_numpy(mask),
        targets=torch.from_numpy(np.array([stored.row_targets(row, longest) for stored, row in ordered])),
        tiers=[stored.tier for stored, _ in ordered],
        batches=[stored for stored, _ in ordered],
        per_vector=ordered[0][0].per_vector,
        weights=torch.tensor([weight_of_stream(stored.stream) for stored, _ in ordered]),
    )


def _widened(targets: Targets) -> Targets:
    """In the types that torch has."""
    return targets.astype(np.int64 if targets.dtype.kind in "iu" else np.float32)


def _padded(picks: list[tuple[StoredBatch, int]], longest: int) -> Floats:
    """Rows of one width and number of taps -> [B, K', N, d]."""
    parts = [(stored, int(stored.starts[row]), int(stored.starts[row + 1])) for stored, row in picks]
    lengths = np.array([end - start for _, start, end in parts])
    values = _decoded(parts)
    taps, count, width = values.shape
    if count == len(picks) * longest:
        return values.reshape(taps, len(picks), longest, width)
    padded = np.zeros((taps, len(picks), longest, width), np.float32)
    padded[:, np.arange(longest)[None, :] < lengths[:, None]] = values
    return padded


def _decoded(parts: Sequence[tuple[StoredBatch, int, int]]) -> Floats:
    """Vectors of batches, each from one to another, one after another: [B, V, d], decoded together."""
    ways = list(dict.fromkeys((stored.codec, stored.codebooks) for stored, _, _ in parts))
    if len(ways) == 1:
        return _written_alike(parts)
    ends = np.cumsum([end - start for _, start, end in parts])
    values = np.empty((parts[0][0].taps, int(ends[-1]), parts[0][0].width), np.float32)
    owners = np.repeat(np.arange(len(parts)), np.diff(ends, prepend=0))
    for way in ways:
        chosen = [place for place, (one, _, _) in enumerate(parts) if (one.codec, one.codebooks) == way]
        values[:, np.isin(owners, chosen)] = _written_alike([parts[place] for place in chosen])
    return values


def _written_alike(parts: Sequence[tuple[StoredBatch, int, int]]) -> Floats:
    first = parts[0][0]
    values = np.concatenate([stored.values[:, start:end] for stored, start, end in parts], axis=1)
    scales = np.concatenate([stored.scales[:, start:end] for stored, start, end in parts], axis=1)
    return decode(
        Tensor(
            codec=first.codec,
            shape=(first.taps, values.shape[1], first.width),
            data=values.tobytes(),
            scales=scales.tobytes(),
            codebooks=first.codebooks,
        )
    )
