"""Whether a device's labels have to do with its samples, as the other devices of its tier understand them.

Of two samples of one batch with different labels it is asked: do they differ in the direction in which the
*other* devices' samples of these two labels differ? With labels drawn at random, or activations that mean
nothing, the answer is yes half of the time, exactly, whatever labels the device has and however many of each:
its own labels in another order would have done as well. Honest labels do better, and how much better is seen
at the other devices. So neither skew nor a hard task makes a device suspect; only pairs that others know
something of count, and a device that sends a single label is not judged.

No device can flood the measure: what it sends counts among the others' only up to the usual number of
samples, and never for itself. Nothing here depends on the fold, which a flood keeps from learning.

Pure: no clock, no journal. Of a sample it keeps nothing but its part in a sum of its device and label, in
:data:`_DIMENSIONS` random directions.

Legend: B taps, K rows, d the backbone's width, m = :data:`_DIMENSIONS`.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import islice
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sidestream.contract.tensors import Floats

LEAST_DEVICES: Final = 3
"""Other devices of the tier that it takes to judge one."""
LEAST_BATCHES: Final = 8
"""And so many of its own batches in which pairs could be asked."""
LEAST_USUAL: Final = 0.65
"""The others' usual share of right pairs, below which they know too little to judge by."""
LEAST_SHARE: Final = 1 / 3
"""A device is suspect if it does better than chance by less than this share of what the others do,"""
SPREADS: Final = 2.0
"""by so many standard errors, so that one with few pairs is given time."""
_RECENT: Final = 24
_LEAST_BATCHES_OF_OTHERS: Final = 4
_LEAST_SAMPLES: Final = 16
_MOST_PAIRS: Final = 60
"""A batch counts no more than one with so many."""
_DIMENSIONS: Final = 128
_COMPARED: Final = 32
MOST_SUMS: Final = 100_000
"""Devices times labels, 50 MB; who has been silent for longest is forgotten first."""

_Labels = npt.NDArray[np.integer[Any]]


class _Answers:
    def __init__(self) -> None:
        self.samples = 0
        self.sums: dict[int, tuple[Floats, int]] = {}
        """By label: the sum of its samples [m], and how many they are."""
        self.asked: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        """Of its last batches: the share of right pairs, and what the batch counts."""

    def add(self, rows: Floats, labels: _Labels) -> int:
        """Take in a batch; return of how many labels there was nothing before."""
        self.samples += len(labels)
        before = len(self.sums)
        for label in np.unique(labels).tolist():
            of_it = rows[labels == label]
            total, count = self.sums.get(label, (np.zeros(_DIMENSIONS, np.float32), 0))
            self.sums[label] = total + of_it.sum(axis=0), count + len(of_it)
        return len(self.sums) - before

    @property
    def agreement(self) -> float:
        """The share of right pairs in its last batches."""
        return sum(share * counts for share, counts in self.asked) / sum(counts for _, counts in self.asked)

    @property
    def error(self) -> float:
        """The standard error of that, from how much batches differ."""
        middle, total = self.agreement, sum(counts for _, counts in self.asked)
        return math.sqrt(sum((counts * (share - middle)) ** 2 for share, counts in self.asked)) / total


class Agreement:
    """Remembers what each device called what. Safe between threads."""

    def __init__(self) -> None:
        self._devices: OrderedDict[tuple[str, str], _Answers] = OrderedDict()
        # By tier, those that have sent something to go by; whoever was heard last stands last.
        self._telling: dict[str, OrderedDict[str, _Answers]] = {}
        self.sums = 0
        """What it remembers: devices times labels, :data:`MOST_SUMS` at most."""
        self._directions: dict[int, Floats] = {}
        self._lock = threading.Lock()

    def note(self, tier: str, device: str, means: Floats, labels: _Labels) -> str:
        """Take in a batch; return why its device is suspect, or nothing.

        Args:
            tier: Of the device.
            device: Its id.
            means: [B, K, d]: each row's mean vector at each tap.
            labels: [K].
        """
        with self._lock:
            own, rows = self._device(tier, device), self._projected(means)
            others = self._others(tier, device)
            if len(others) >= LEAST_DEVICES and (asked := _ask(others, rows, labels)):
                own.asked.append(asked)
            self.sums += own.add(rows, labels)
            self._file(tier, device, own)
            while self.sums > MOST_SUMS and len(self._devices) > 1:
                self._drop(next(iter(self._devices)))
            return self._verdict(own, others)

    def forget(self, device: str) -> None:
        """Go by what the other devices say only."""
        with self._lock:
            for key in [key for key in self._devices if key[1] == device]:
                self._drop(key)

    @staticmethod
    def _verdict(own: _Answers, others: Sequence[_Answers]) -> str:
        known = [one.agreement for one in others if len(one.asked) >= _LEAST_BATCHES_OF_OTHERS]
        if len(own.asked) < LEAST_BATCHES or len(known) < LEAST_DEVICES:
            return ""
        usual = median(known)
        best = own.agreement + SPREADS * own.error
        if usual < LEAST_USUAL or best - 0.5 >= LEAST_SHARE * (usual - 0.5):
            return ""
        return (
            f"its labels suit its samples no better than in another order: {own.agreement:.2f} by what the "
            f"tier's other devices call alike, where these have {usual:.2f} and chance has 0.50"
        )

    def _projected(self, means: Floats) -> Floats:
        """[K, m]: rows in the same random directions, normalised at each tap as the side-network does."""
        centred = means - means.mean(axis=2, keepdims=True)
        scaled = centred / (centred.std(axis=2, keepdims=True) + 1e-6)
        flat = scaled.transpose(1, 0, 2).reshape(means.shape[1], -1).astype(np.float32)
        width = flat.shape[1]
        if width not in self._directions:
            drawn = np.random.default_rng(0).standard_normal((width, _DIMENSIONS), np.float32)
            self._directions[width] = drawn / np.float32(np.sqrt(width))
        projected: Floats = flat @ self._directions[width]
        return projected

    def _device(self, tier: str, device: str) -> _Answers:
        own = self._devices.setdefault((tier, device), _Answers())
        self._devices.move_to_end((tier, device))
        return own

    def _file(self, tier: str, device: str, own: _Answers) -> None:
        """Keep who may be asked in order, once there is something to go by."""
        if own.samples >= _LEAST_SAMPLES:
            telling = self._telling.setdefault(tier, OrderedDict())
            telling[device] = own
            telling.move_to_end(device)

    def _others(self, tier: str, device: str) -> list[_Answers]:
        """Those heard last that have sent something to go by."""
        telling = self._telling.get(tier, OrderedDict())
        return list(islice((one for name, one in reversed(telling.items()) if name != device), _COMPARED))

    def _drop(self, key: tuple[str, str]) -> None:
        tier, device = key
        self.sums -= len(self._devices.pop(key).sums)
        self._telling.get(tier, OrderedDict()).pop(device, None)


def _ask(others: Sequence[_Answers], rows: Floats, labels: _Labels) -> tuple[float, int] | None:
    """The share of a batch's pairs that differ as others' samples of these labels do, and what it counts.

    For rows x, y labelled a, b with the others' means μ: whether (x − y)·(μ_a − μ_b) is above 0.
    """
    fair = median(one.samples for one in others)
    known = {
        label: mean
        for label in np.unique(labels).tolist()
        if (mean := _mean(others, label, fair)) is not None
    }
    usable = [row for row, label in enumerate(labels.tolist()) if label in known]
    if len(usable) < 2:
        return None
    rows, labels = rows[usable], labels[usable]
    products = rows @ np.stack([known[label] for label in labels.tolist()]).T  # [K, K]: row by mean
    right = np.diag(products)
    margins = right[:, None] + right[None, :] - products - products.T
    first, second = np.triu_indices(len(labels), 1)
    margins = margins[first, second][labels[first] != labels[second]]
    if not len(margins):
        return None
    return float(np.mean(margins > 0) + 0.5 * np.mean(margins == 0)), min(len(margins), _MOST_PAIRS)


def _mean(others: Sequence[_Answers], label: int, fair: float) -> Floats | None:
    """[m]: the mean of the others' samples of a label, if two of them have any.

    One that has sent more than ``fair`` samples counts as if it had sent so many.
    """
    having = [(one, min(1.0, fair / one.samples)) for one in others if label in one.sums]
    if len(having) < 2:
        return None
    total = sum(share * one.sums[label][0] for one, share in having)
    mean: Floats = np.asarray(total / sum(share * one.sums[label][1] for one, share in having), np.float32)
    return mean
