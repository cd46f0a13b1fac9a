"""What each device's rows count in learning: less the less its labels suit them, and never too much at once.

A device's rows are answered by the means of the *other* devices' rows, label by label, among the labels that
it uses itself: so neither what it lacks nor how much of each it has counts. What it gets right beyond chance
is held against what the others get. Where it does clearly worse, its rows count less, down to nothing; with
few rows nothing is clear. Nobody has more of a say than the usual device. A device with one label is asked
among all of them, if others know that one well.

Pure, and for the fold: the same rows give the same weights.

Legend: N rows, F features, D devices, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from side_trainer.rows.drawn_rows import Drawn, Ints
from sidestream.contract.tensors import Floats

LEAST_DEVICES: Final = 4
"""Of a family, that it takes to judge one of them."""
NOTHING_BELOW: Final = 0.35
"""A device whose skill is this share of the others' counts for nothing,"""
ALL_ABOVE: Final = 0.65
"""one with this share or more for all that it is; between them it rises."""
MOST_DOUBTED: Final = 1 / 3
"""Where more of those judged would be doubted, it cannot be told who is right, and nobody is."""
_DOUBTED: Final = 0.5
_SPREADS: Final = 2.0
_ROUNDS: Final = 3
_LEAST_OF_OTHERS: Final = 2  # devices, and rows of each label
_WELL_KNOWN: Final = 16
_LEAST_SKILL: Final = 0.15


class _Skill(NamedTuple):
    """How a device's labels suit its rows."""

    value: float
    """Right answers beyond chance: 0 by chance, 1 if all are right."""
    error: float
    """Its standard error."""


class DeviceWeights:
    """What each device's rows count, 1 at most. Devices are numbered in the order in which they came.

    Args:
        device_of: Whose a stream is.
    """

    def __init__(self, device_of: Callable[[str], str]) -> None:
        self._device_of = device_of
        self._numbers: dict[str, int] = {}
        self._of_stream: dict[str, int] = {}
        self._rows: list[int] = []
        self._doubted: set[str] = set()  # told already; a restart tells again
        self.values: Floats = np.ones(0, np.float32)
        """[D]"""

    def add(self, stream: str, rows: int) -> None:
        """Take in the next batch's stream, and its rows."""
        if stream not in self._of_stream:
            number = self._numbers.setdefault(self._device_of(stream), len(self._numbers))
            self._of_stream[stream] = number
            if number == len(self._rows):
                self._rows.append(0)
                self.values = np.append(self.values, np.float32(1))
        self._rows[self._of_stream[stream]] += rows

    def count(self, rows: Iterable[tuple[str, int]]) -> None:
        """Begin anew with so many rows of each stream; what devices count stays, by device."""
        before = dict(zip(self._numbers, self.values.tolist(), strict=True))
        self._numbers, self._of_stream, self._rows = {}, {}, []
        self.values = np.ones(0, np.float32)
        for stream, more in rows:
            self.add(stream, more)
        self.values = np.array([before.get(name, 1.0) for name in self._numbers], np.float32)

    def number_of(self, stream: str) -> int:
        return self._of_stream[stream]

    def of(self, stream: str) -> float:
        """What a row of a stream counts."""
        return float(self.values[self._of_stream[stream]])

    def weigh(self, drawn: Iterable[Drawn], most: float) -> dict[str, float]:
        """Weigh devices anew.

        Args:
            drawn: Rows of each family; none where rows have no label each.
            most: The share of all rows' weight that one device may have; two devices' fair shares at least.

        Returns:
            Devices whose labels make them count for less than half and were not known to; what they count.
        """
        return self.take(*weighed(drawn, self._rows, most))

    @property
    def names(self) -> list[str]:
        """Of each device, [D]."""
        return list(self._numbers)

    @property
    def rows(self) -> list[int]:
        """[D]: how many rows each has sent."""
        return list(self._rows)

    def take(self, trusts: npt.NDArray[np.float64], values: Floats) -> dict[str, float]:
        """Weigh devices as :func:`weighed` says; return as :meth:`weigh` does."""
        self.values = values
        found = {name: float(trusts[at]) for name, at in self._numbers.items() if trusts[at] < _DOUBTED}
        fresh = {name: trust for name, trust in found.items() if name not in self._doubted}
        self._doubted = set(found)
        return fresh


def weighed(
    drawn: Iterable[Drawn], rows: Sequence[int], most: float
) -> tuple[npt.NDArray[np.float64], Floats]:
    """[D] each: how far devices' labels are to be trusted, and what a row of theirs counts.

    Args:
        drawn: Rows of each family; none where rows have no label each.
        rows: [D]: how many rows each has sent.
        most: As :meth:`DeviceWeights.weigh` has it.
    """
    trusts = np.ones(len(rows))
    for one in drawn:
        least = int(one.taps.min())
        features = one.features[:, :least].reshape(len(one.taps), -1)
        trusts = np.minimum(trusts, trusts_of(features, one.targets, one.owners, len(trusts)))
    counts = np.array(rows, np.float64) * trusts
    return trusts, (trusts * shares_of(counts, most)).astype(np.float32)


def trusts_of(features: Floats, targets: Ints, owners: Ints, devices: int) -> npt.NDArray[np.float64]:
    """[D]: how far each device's labels are to be trusted, from rows [N, F], targets [N] and owners [N]."""
    trusts, known = np.ones(devices), np.bincount(owners, minlength=devices)
    if (known > 0).sum() < LEAST_DEVICES:
        return trusts
    usual = max(np.median(known[known > 0]), np.mean(known[known > 0]))
    fair = np.minimum(1.0, usual / np.maximum(known, 1))
    skills: list[_Skill | None] = []
    for _ in range(_ROUNDS):
        skills = _skills(features, targets, owners, trusts * fair)
        trusts = _trusts(skills)
    judged = sum(one is not None for one in skills)
    return trusts if (trusts < _DOUBTED).sum() <= MOST_DOUBTED * judged else np.ones(devices)


def _skills(
    features: Floats, targets: Ints, owners: Ints, trusts: npt.NDArray[np.float64]
) -> list[_Skill | None]:
    """[D]: of each device, None where it cannot be told."""
    labels, targets = np.unique(targets, return_inverse=True)
    counts = np.zeros((len(trusts), len(labels)))
    np.add.at(counts, (owners, targets), 1.0)
    weights = (trusts[owners]).astype(np.float32)
    sums = _sums(features * weights[:, None], targets, len(labels))
    masses = trusts @ counts
    using = (counts > 0) & (trusts > 0)[:, None]
    users = using.sum(axis=0)
    found: list[_Skill | None] = [None] * len(trusts)
    for device, own in _rows_of_each(owners):
        trust = trusts[device]
        own_sums = _sums(features[own], targets[own], len(labels)) * np.float32(trust)
        left = masses - trust * counts[device]
        known = (left >= _LEAST_OF_OTHERS) & (users - using[device] >= _LEAST_OF_OTHERS)
        means = (sums - own_sums) / np.maximum(left, 1e-9)[:, None].astype(np.float32)
        found[device] = _skill(features[own], targets[own], means, known, left)
    return found


def _rows_of_each(owners: Ints) -> Iterator[tuple[int, Ints]]:
    """Each device that has rows, and which they are, in order."""
    order = np.argsort(owners, kind="stable")
    devices, starts = np.unique(owners[order], return_index=True)
    return zip(devices.tolist(), np.split(order, starts[1:]), strict=True)


def _skill(
    rows: Floats, targets: Ints, means: Floats, known: npt.NDArray[np.bool_], left: npt.NDArray[np.float64]
) -> _Skill | None:
    """One device's, by the others' means [C, F]."""
    own = np.unique(targets)
    asked = own[known[own]]
    among = asked
    if len(own) == 1:
        asked = asked[left[asked] >= _WELL_KNOWN]
        among = np.flatnonzero(known)
    if not len(asked) or len(among) < 2:
        return None
    judged = np.isin(targets, asked)
    chosen = means[among]
    scores = _product(rows[judged], np.ascontiguousarray(chosen.T)) - 0.5 * np.square(chosen).sum(axis=1)
    right = (among[scores.argmax(axis=1)] == targets[judged]).astype(np.float64)
    by_label = 1 / np.bincount(targets[judged])[targets[judged]]
    weights = np.sqrt(by_label)  # between rows and labels
    weights /= weights.sum()
    rate, chance = float(weights @ right), 1 / len(among)
    # With one row more of either kind, so that a handful of rows is never sure.
    count = 1 / float(weights @ weights)
    middle = (rate * count + 1) / (count + 2)
    error = float(np.sqrt(middle * (1 - middle) / count))
    return _Skill((rate - chance) / (1 - chance), error / (1 - chance))


def _trusts(skills: Sequence[_Skill | None]) -> npt.NDArray[np.float64]:
    """[D]: 1 where a device does about as well as the others, 0 where it does by chance."""
    trusts = np.ones(len(skills))
    judged = [device for device, one in enumerate(skills) if one is not None]
    known = [one for one in skills if one is not None]
    if len(known) < LEAST_DEVICES:
        return trusts
    for device, own, usual in zip(
        judged, known, medians_of_others([one.value for one in known]), strict=True
    ):
        if usual > _LEAST_SKILL:
            share = (own.value + _SPREADS * own.error) / usual
            trusts[device] = np.clip((share - NOTHING_BELOW) / (ALL_ABOVE - NOTHING_BELOW), 0, 1)
    return trusts


def medians_of_others(values: Sequence[float]) -> list[float]:
    """Of each value, the median of all others: by one sorting, however many there are."""
    ordered, ranks = np.sort(values), np.empty(len(values), np.int64)
    ranks[np.argsort(values)] = np.arange(len(values))

    def other(place: int) -> npt.NDArray[np.float64]:
        """The value in a place of the others' order."""
        found: npt.NDArray[np.float64] = np.where(place < ranks, ordered[place], ordered[place + 1])
        return found

    middle, odd = divmod(len(values) - 1, 2)
    medians = other(middle) if odd else (other(middle - 1) + other(middle)) / 2
    return [float(one) for one in medians]


def shares_of(counts: npt.NDArray[np.float64], most: float) -> npt.NDArray[np.float64]:
    """[D]: what is left of each device's rows where none may count for more than a share of all."""
    devices = int((counts > 0).sum())
    share = max(most, 2 / max(1, devices))
    if share >= 1:
        return np.ones(len(counts))
    # With the k largest held to w each: w = share · (k · w + the others' rows), for the least k that will do.
    falling = np.sort(counts)[::-1]
    for held in range(len(falling)):
        bound = share * falling[held:].sum() / (1 - share * held)
        if falling[held] <= bound:
            break
    kept: npt.NDArray[np.float64] = np.minimum(1.0, bound / np.maximum(counts, 1e-9))
    return kept


def _sums(features: Floats, targets: Ints, labels: int) -> Floats:
    """[C, F]: of the rows of each label."""
    return _product((targets == np.arange(labels)[:, None]).astype(np.float32), features)


def _product(left: Floats, right: Floats) -> Floats:
    """By torch: NumPy's own might take as many threads as there are processors, and then give other bits."""
    product: Floats = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    return product
