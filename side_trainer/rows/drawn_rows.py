"""Rows drawn from the journal, as what a linear answer goes by: means of normalised vectors.

Legend: N rows, K rows of a batch, B taps, d a backbone's width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from side_trainer.journal.records import TierRecord
from side_trainer.rows.training_rows import RowStore, StoredBatch
from sidestream.contract.tensors import Floats

MOST_VALUES: Final = 2**23
"""Rows drawn times their features, at most; all rows where these are fewer."""
_KEPT_BYTES: Final = 4 * MOST_VALUES  # of features, so that what is drawn once fits
_EPS: Final = np.float32(1e-5)

Ints = npt.NDArray[np.int64]


class Drawn(NamedTuple):
    """Rows of one backbone family, in random order."""

    features: Floats
    """[N, B, d], zero where a row has fewer taps."""
    taps: Ints
    """[N]: how many taps each has."""
    targets: Ints
    """[N]"""
    owners: Ints
    """[N]: whose they are, device numbers."""


class RowFeatures:
    """The features of batches, kept: rows are drawn at each doubling, and decoding is most of the work.

    Args:
        rows: The batches.
        kept_bytes: The least recently used go first.
    """

    def __init__(self, rows: RowStore, *, kept_bytes: int = _KEPT_BYTES) -> None:
        self.rows, self._kept_bytes = rows, kept_bytes
        self._kept: OrderedDict[int, Floats] = OrderedDict()
        self._bytes = 0

    def of(self, offset: int) -> Floats:
        """[K, B, d] of the batch at ``offset``, as :func:`features_of` has them."""
        if (found := self._kept.get(offset)) is not None:
            self._kept.move_to_end(offset)
            return found
        found = self._kept[offset] = features_of(self.rows.batch(offset))
        self._bytes += found.nbytes
        while self._bytes > self._kept_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found


def draw(
    known: RowFeatures,
    tiers: Mapping[str, TierRecord],
    generator: np.random.Generator,
    owner_of: Callable[[str], int],
    *,
    share: int = 1,
) -> dict[str, Drawn]:
    """Draw rows, by alignment map.

    Args:
        known: Of all rows; each has one label.
        tiers: By name.
        generator: Which, and their order.
        owner_of: A stream's device number.
        share: One of so many parts of what may be drawn at most.
    """
    rows = known.rows
    width = max(len(tier.taps) * tier.width for tier in tiers.values())
    chosen = generator.permutation(len(rows))[: max(1, MOST_VALUES // share // width)]
    by_align: dict[str, list[tuple[int, int]]] = {}
    for offset, row in rows.locate(chosen):
        by_align.setdefault(tiers[rows.batch(offset).tier].align, []).append((offset, row))
    return {align: _drawn(known, picks, owner_of) for align, picks in sorted(by_align.items())}


def features_of(stored: StoredBatch) -> Floats:
    """[K, B, d]: each tap's mean over a row's normalised vectors, normalised again."""
    lengths = np.diff(stored.starts).astype(np.float32)
    sums = np.add.reduceat(_normed(stored.decode()), stored.starts[:-1], axis=1)
    means: Floats = np.ascontiguousarray(_normed(sums / lengths[None, :, None]).transpose(1, 0, 2))
    return means


def _drawn(known: RowFeatures, picks: list[tuple[int, int]], owner_of: Callable[[str], int]) -> Drawn:
    places: dict[int, list[int]] = {}
    for place, (offset, _) in enumerate(picks):
        places.setdefault(offset, []).append(place)
    taps, targets, owners = (np.zeros(len(picks), np.int64) for _ in range(3))
    features: Floats | None = None
    for offset, at in sorted(places.items()):
        stored = known.rows.batch(offset)
        found, within = known.of(offset), [picks[place][1] for place in at]
        most, width = stored.taps, found.shape[2]
        if features is None or features.shape[1] < most:
            wider = np.zeros((len(picks), most, width), np.float32)
            if features is not None:
                wider[:, : features.shape[1]] = features
            features = wider
        features[at, :most] = found[within]
        taps[at], targets[at], owners[at] = most, stored.targets[within], owner_of(stored.stream)
    assert features is not None
    return Drawn(features, taps, targets, owners)


def _normed(values: npt.NDArray[Any]) -> Floats:
    """[…, d]: each of mean 0 and variance 1."""
    centred = values - values.mean(axis=-1, keepdims=True)
    normed: Floats = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + _EPS)
    return normed
