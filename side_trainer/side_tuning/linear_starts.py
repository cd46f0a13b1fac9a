"""Linear starts: what the taps of all rows so far say of a label, in closed form, beside the side-network.

With little data a linear answer on the uploads is hard to beat, and the side-network learns what it misses
only once there is more. So each answer at B taps has one: a ridge regression on the means of rows' normalised
vectors (:mod:`side_trainer.side_tuning.ridge`). Among unequal backbones each adds to the next shallower one,
which more rows teach, what its own taps explain of the rest. Its share in the answer falls with the rows.

When it is fitted, and to which rows, derives from the journal's records alone.

Legend: N rows, B taps, d a backbone's width, C labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from side_trainer.method import Facts
from side_trainer.rows.drawn_rows import Drawn
from side_trainer.side_tuning.objectives import OBJECTIVES
from side_trainer.side_tuning.ridge import calibrated, ridge
from side_trainer.side_tuning.views import trust
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.side_network.network import SideNetwork

FULL_SHARE_ROWS: Final = 320
"""Up to so many rows the start counts as much as the side-network, and less the more there are,"""
LEAST_SHARE: Final = 0.25
"""but no less than this of it,"""
UNSURE_SHARE: Final = 2.0
"""nor less than this, times how unsure it is."""
EARLY: Final = 512
"""Rows up to which starts are fitted while they come, and not only when none does."""
_FIRST_LOOK: Final = 16
_LEAST_ROWS: Final = 4
_DEEPER: Final = 2**0.5
_BALANCE: Final = 0.5
_LABELS: Final = OBJECTIVES[Task.TEXT_CLASSIFICATION]


class LinearStart(NamedTuple):
    """A linear answer of rows with B taps."""

    weight: Floats
    """[B, d, C]"""
    bias: Floats
    """[C]"""


def share_of(rows: int, unsure: float) -> float:
    """What a start counts beside the side-network.

    Args:
        rows: How many there are.
        unsure: The loss of what it says of rows left out, as a share of guessing's: high where labels are
            noisy or hard, and a side-network would learn its rows by heart.
    """
    return min(1.0, max(LEAST_SHARE, FULL_SHARE_ROWS / max(1, rows), UNSURE_SHARE * unsure))


def set_starts(
    network: SideNetwork, drawn: Mapping[str, Drawn], facts: Facts, weights: Floats, rows: int
) -> None:
    """Give a network the starts that some rows make.

    Args:
        network: Has the alignment maps.
        drawn: As :func:`fit_starts` has them, and so weights and rows.
        facts: Tiers and labels.
        weights: As there.
        rows: As there.
    """
    exits = {
        align: sorted({len(tier.taps) for tier in facts.tiers.values() if tier.align == align})
        for align in drawn
    }
    for (align, _), start in fit_starts(drawn, exits, len(facts.labels), weights, rows).items():
        network.set_start(align, start.weight, start.bias)


def fit_starts(
    drawn: Mapping[str, Drawn], exits: Mapping[str, Sequence[int]], labels: int, weights: Floats, rows: int
) -> dict[tuple[str, int], LinearStart]:
    """Fit the starts of all families.

    Args:
        drawn: Rows by alignment map.
        exits: The numbers of taps to answer at, rising, by alignment map.
        labels: C.
        weights: What each device's rows count, by device number.
        rows: Of how many the rows were drawn.

    Returns:
        By alignment map and number of taps; scaled by what they count in the answer.
    """
    found = {
        (align, taps): start
        for align, one in drawn.items()
        for taps, start in _chain(one, weights[one.owners], exits[align], labels)
    }
    drawn_of_all = np.float32(sum(len(one.targets) for one in drawn.values()) / max(1, rows))
    return {
        key: LinearStart(weight * drawn_of_all, bias * drawn_of_all) for key, (weight, bias) in found.items()
    }


def _chain(
    drawn: Drawn, weights: Floats, exits: Sequence[int], labels: int
) -> Iterator[tuple[int, LinearStart]]:
    """The start at each number of taps: that of the next fewer, and what the taps explain of the rest."""
    features, counts, targets = drawn.features, drawn.taps, torch.from_numpy(drawn.targets)
    all_counts = np.bincount(drawn.targets, weights, minlength=labels).astype(np.float64)
    said: Tensor | None = None  # [N, C]: by the start below, of each row without having seen it
    slopes, bias = torch.zeros(0, labels, dtype=torch.float64), torch.zeros(labels, dtype=torch.float64)
    for taps in exits:
        seen = np.flatnonzero((counts >= taps) & (weights > 0))
        if len(seen) < _LEAST_ROWS or len(np.unique(drawn.targets[seen])) < 2:
            continue
        scales = torch.from_numpy(_scales(taps, features.shape[2]))
        chosen = torch.from_numpy(features[seen, :taps].reshape(len(seen), -1)).double() * scales
        own = np.bincount(drawn.targets[seen], weights[seen], minlength=labels).astype(np.float64)
        given = torch.from_numpy(
            weights[seen] * (all_counts**_BALANCE / np.maximum(own, 1e-9))[targets[seen]]
        )
        fitted = ridge(chosen, targets[seen], given, labels, None if said is None else said[seen])
        share = 1.0 if said is None else trust(_LABELS.divergence(all_counts, own))
        added = share * fitted.weight * scales[:, None]
        slopes = added + torch.nn.functional.pad(slopes, (0, 0, 0, len(added) - len(slopes)))
        bias = bias + share * fitted.bias
        before = 0.0 if said is None else (1 - share) * said[seen]
        said = torch.zeros(len(targets), labels, dtype=torch.float64)
        said[seen] = share * fitted.unseen + before
        heat, loss = calibrated(said[seen], targets[seen], given)
        heat *= share_of(len(weights), loss / np.log(labels))
        weight = (slopes * heat).reshape(taps, -1, labels)
        yield taps, LinearStart(weight.float().numpy(), (bias * heat).float().numpy())


def doubled(before: int, rows: int) -> bool:
    """Whether the rows have doubled, counted from the first look."""
    return rows >= _FIRST_LOOK and (before < _FIRST_LOOK or before.bit_length() < rows.bit_length())


def _scales(taps: int, width: int) -> npt.NDArray[np.float64]:
    """[B·d]: what features are multiplied by before they are fitted: deeper taps say more."""
    of_taps = _DEEPER ** (np.arange(taps) - taps + 1.0) / np.sqrt(width)
    return np.repeat(of_taps, width)
