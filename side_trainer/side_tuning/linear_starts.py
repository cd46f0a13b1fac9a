"""Linear starts: what the taps of all rows so far say of a label, in closed form, beside the side-network.

With little data a linear answer on the uploads is hard to beat, and the side-network learns what it misses only
once there is more. So each answer at B taps has one: a ridge regression on the means of rows' normalised
vectors (:mod:`side_trainer.side_tuning.ridge`). Of unequal backbones each adds to the next shallower one, which
more rows teach, what its own taps explain of the rest. Its share in the answer falls with the rows.

When it is fitted, and to which rows, derives from the journal's records alone.

Legend: N rows, B taps, d a backbone's width, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from side_trainer.journal.records import TierRecord
from side_trainer.side_tuning.objectives import OBJECTIVES
from side_trainer.side_tuning.ridge import ridge, temperature
from side_trainer.side_tuning.training_rows import RowStore, StoredBatch
from side_trainer.side_tuning.views import trust
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats

MOST_VALUES: Final = 2**23
"""A fit takes so many rows, times their features, at most; drawn at random where there are more."""
FULL_SHARE_ROWS: Final = 320
"""Up to so many rows the start counts as much as the side-network, and less the more there are,"""
LEAST_SHARE: Final = 0.25
"""but no less than this of it."""
_LEAST_ROWS: Final = 4
_DEEPER: Final = 2**0.5
_BALANCE: Final = 0.5
_LABELS: Final = OBJECTIVES[Task.TEXT_CLASSIFICATION]
_EPS: Final = np.float32(1e-5)
_EARLY: Final = (16, 32, 64, 128, 256)
"""While rows come, starts are fitted as there are so many; and when idle time begins."""

Ints = npt.NDArray[np.int64]


class LinearStart(NamedTuple):
    """A linear answer of rows with B taps."""

    weight: Floats
    """[B, d, C]"""
    bias: Floats
    """[C]"""


def is_due(before: int, rows: int) -> bool:
    """Whether starts are fitted anew now that there are ``rows`` and not ``before``."""
    return any(before < least <= rows for least in _EARLY)


def share_of(rows: int) -> float:
    """What a start counts beside the side-network."""
    return max(LEAST_SHARE, min(1.0, FULL_SHARE_ROWS / max(1, rows)))


def fit_starts(
    rows: RowStore,
    tiers: Mapping[str, TierRecord],
    labels: int,
    generator: np.random.Generator,
    weight_of: Callable[[int], Floats],
) -> dict[tuple[str, int], LinearStart]:
    """Fit the starts of all families to the rows so far.

    Args:
        rows: All of them.
        tiers: By name.
        labels: C.
        generator: Draws rows, and their order.
        weight_of: What each row of the batch at an offset counts, [K].

    Returns:
        By alignment map and number of taps; scaled by what they count in the answer.
    """
    width = max((len(tier.taps) * tier.width for tier in tiers.values()), default=1)
    drawn = generator.permutation(len(rows))[: max(_LEAST_ROWS, MOST_VALUES // width)]
    share = np.float32(share_of(len(rows)) * len(drawn) / max(1, len(rows)))
    picks = [(rows.batch(offset), offset, row) for offset, row in rows.locate(drawn)]
    found: dict[tuple[str, int], LinearStart] = {}
    for align in sorted({tier.align for tier in tiers.values()}):
        own = [pick for pick in picks if tiers[pick[0].tier].align == align]
        weights = np.array([weight_of(offset)[row] for _, offset, row in own], np.float32)
        exits = sorted({len(tier.taps) for tier in tiers.values() if tier.align == align})
        for taps, start in _chain([(stored, row) for stored, _, row in own], weights, exits, labels):
            found[align, taps] = LinearStart(start.weight * share, start.bias * share)
    return found


def features_of(stored: StoredBatch) -> Floats:
    """[K, B, d]: each tap's mean over a row's normalised vectors, normalised again."""
    lengths = np.diff(stored.starts).astype(np.float32)
    sums = np.add.reduceat(_normed(stored.activations), stored.starts[:-1], axis=1)
    return _normed(sums / lengths[None, :, None]).transpose(1, 0, 2)


def _chain(
    rows: Sequence[tuple[StoredBatch, int]], weights: Floats, exits: Sequence[int], labels: int
) -> Iterator[tuple[int, LinearStart]]:
    """The start at each number of taps: that of the next fewer, and what the taps explain of the rest."""
    features = _features(rows)
    targets = torch.tensor([int(stored.targets[row]) for stored, row in rows])
    counts = np.array([len(stored.activations) for stored, _ in rows])
    all_counts = np.bincount(targets, weights, minlength=labels)
    said: Tensor | None = None  # [N, C]: by the start below, of each row without having seen it
    slopes, bias = torch.zeros(0, labels, dtype=torch.float64), torch.zeros(labels, dtype=torch.float64)
    for taps in exits:
        seen = np.flatnonzero((counts >= taps) & (weights > 0))
        if len(seen) < _LEAST_ROWS or len(targets[seen].unique()) < 2:
            continue
        scales = torch.from_numpy(_scales(taps, features.shape[2]))
        chosen = torch.from_numpy(features[seen, :taps].reshape(len(seen), -1)).double() * scales
        own = np.bincount(targets[seen], weights[seen], minlength=labels)
        given = torch.from_numpy(weights[seen] * (all_counts**_BALANCE / np.maximum(own, _EPS))[targets[seen]])
        fitted = ridge(chosen, targets[seen], given, labels, None if said is None else said[seen])
        share = 1.0 if said is None else trust(_LABELS.divergence(all_counts, own))
        added = share * fitted.weight * scales[:, None]
        slopes = added + torch.nn.functional.pad(slopes, (0, 0, 0, len(added) - len(slopes)))
        bias = bias + share * fitted.bias
        before = 0.0 if said is None else (1 - share) * said[seen]
        said = torch.zeros(len(targets), labels, dtype=torch.float64)
        said[seen] = share * fitted.unseen + before
        heat = temperature(said[seen], targets[seen], given)
        weight = (slopes * heat).reshape(taps, -1, labels)
        yield taps, LinearStart(weight.float().numpy(), (bias * heat).float().numpy())


def _features(rows: Sequence[tuple[StoredBatch, int]]) -> Floats:
    """[N, B, d], 0 where a row has fewer taps."""
    known: dict[int, Floats] = {}
    for stored, _ in rows:
        if id(stored) not in known:
            known[id(stored)] = features_of(stored)
    most = max((len(stored.activations) for stored, _ in rows), default=0)
    width = rows[0][0].activations.shape[2] if rows else 0
    found = np.zeros((len(rows), most, width), np.float32)
    for index, (stored, row) in enumerate(rows):
        of_row = known[id(stored)][row]
        found[index, : len(of_row)] = of_row
    return found


def _scales(taps: int, width: int) -> npt.NDArray[np.float64]:
    """[B·d]: what features are multiplied by before they are fitted: deeper taps say more."""
    of_taps = _DEEPER ** (np.arange(taps) - taps + 1.0) / np.sqrt(width)
    return np.repeat(of_taps, width)


def _normed(values: Floats) -> Floats:
    """[…, d]: each of mean 0 and variance 1."""
    centred = values - values.mean(axis=-1, keepdims=True)
    normed: Floats = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + _EPS)
    return normed
