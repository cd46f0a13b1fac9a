"""Which device sends what no honest one would: valid in form, and nothing like the fleet's.

Two figures of each batch, held against those of the tier's other devices, each device counting once however
much it sends:

- the **size** of its activations at each tap: of a row's mean vector, the median over rows. The backbone's
  fingerprint is the same on all, so this hardly differs between honest devices, whatever their data. Nor can
  a device choose with whom it is compared: the mean of all tokens, of segments of them and of a random draw
  is the same vector. What is left is below 1 in the logarithm over every policy and codec there is (MiniLM,
  two data sets; two decoders), so all policies are held against each other.
- the **loss** before the batch is learnt, in tasks other than a label a sample. Activations or targets that
  mean nothing have as much as guessing, for ever. Where samples have a label each, an honest device that has
  nearly one label alone is as hard as that, and :mod:`side_trainer.quarantine.agreement` judges
  instead.

Nothing is judged before enough other devices are known. Robust statistics only: medians, and the median
distance from them. Pure: no clock, no journal.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from statistics import median
from typing import Final

import numpy as np

from metrics.fleet_page.fleet import MAX_DEVICES
from sidestream.contract.tensors import Floats

LEAST_DEVICES: Final = 3
"""Other devices of the tier that it takes to judge one."""
SIZE_BATCHES: Final = 3
"""So many of its last :data:`SIZE_RECENT` batches must be of another size: one that is right now and then
does not make up for the others."""
SIZE_RECENT: Final = 16
SIZE_LEAST: Final = 1.5
"""By at least so much in the natural logarithm, at one tap: a factor of 4.5."""
LOSS_BATCHES: Final = 8
"""Its last so many batches must be hard, in the median."""
LOSS_LEAST: Final = 0.4
"""By at least so much, in nats a sample,"""
LOSS_SHARE: Final = 1.25
"""and at least by this share of the others' loss."""
SPREADS: Final = 6.0
"""And either by so many of the others' median distances from their median."""
_LEAST_VALUES: Final = 16
_RECENT: Final = 4
_COMPARED: Final = 64


class _Habits:
    def __init__(self) -> None:
        self.sizes: deque[tuple[float, ...]] = deque(maxlen=SIZE_RECENT)
        self.losses: deque[float] = deque(maxlen=_RECENT)
        self.excesses: deque[float] = deque(maxlen=LOSS_BATCHES)


class Suspicion:
    """Remembers the last few batches of each device. Safe between threads."""

    def __init__(self) -> None:
        self._devices: OrderedDict[tuple[str, str], _Habits] = OrderedDict()
        self._tiers: dict[str, OrderedDict[str, _Habits]] = {}  # the same, by tier
        self._lock = threading.Lock()

    def note_size(self, tier: str, device: str, sizes: Sequence[float]) -> str:
        """Take in the size of a batch at each tap; return why the device is suspect, or nothing."""
        with self._lock:
            own = self._device(tier, device)
            own.sizes.append(tuple(math.log(max(size, 1e-30)) for size in sizes))
            others = [_medians(one.sizes) for one in self._others(tier, device) if one.sizes]
            if len(others) < LEAST_DEVICES:
                return ""
            usual = [_usual(tap) for tap in zip(*others, strict=True)]
            odd = [found for sizes in own.sizes if (found := _furthest(sizes, usual))]
            if len(odd) < SIZE_BATCHES:
                return ""
            tap, excess = odd[-1]
            return (
                f"its activations are {math.exp(excess):.3g} times as large as those of the tier's other "
                f"devices, at tap {tap}"
            )

    def note_loss(self, tier: str, device: str, loss: float) -> str:
        """Take in the loss of a batch before it was learnt; return why the device is suspect, or nothing."""
        with self._lock:
            own = self._device(tier, device)
            others = [one for one in self._others(tier, device) if len(one.losses) >= 2]
            own.losses.append(loss)
            if len(others) < LEAST_DEVICES:
                return ""
            usual_loss = median(median(one.losses) for one in others)
            own.excesses.append(loss - usual_loss)
            if len(own.excesses) < LOSS_BATCHES:
                return ""
            excess = median(own.excesses)
            usual = [value for one in others for value in one.excesses]
            if len(usual) < _LEAST_VALUES:
                return ""
            spread = SPREADS * _spread(usual, median(usual))
            if excess <= max(LOSS_LEAST, LOSS_SHARE * usual_loss, spread):
                return ""
            return f"its batches are harder than other devices' of the tier, by {excess:.2f} nats a sample"

    def _device(self, tier: str, device: str) -> _Habits:
        own = self._devices.setdefault((tier, device), _Habits())
        self._devices.move_to_end((tier, device))
        of_tier = self._tiers.setdefault(tier, OrderedDict())
        of_tier[device] = own
        of_tier.move_to_end(device)
        if len(self._devices) > MAX_DEVICES:
            (its_tier, name), _ = self._devices.popitem(last=False)
            del self._tiers[its_tier][name]
        return own

    def _others(self, tier: str, device: str) -> list[_Habits]:
        """Those heard last: enough for a median, however large the fleet."""
        found = (one for name, one in reversed(self._tiers[tier].items()) if name != device)
        return list(islice(found, _COMPARED))


def row_sizes(means: Floats) -> tuple[float, ...]:
    """The size of a batch's activations at each tap: of a row's mean vector, the median over rows.

    Args:
        means: [B, K, d]: the rows' mean vectors.
    """
    squares = np.mean(np.square(means, dtype=np.float64), axis=2)
    return tuple(np.median(np.sqrt(squares), axis=1).tolist())


def _medians(sizes: Iterable[Sequence[float]]) -> list[float]:
    """Of each tap."""
    return [median(tap) for tap in zip(*sizes, strict=True)]


def _usual(values: Sequence[float]) -> tuple[float, float]:
    """The middle of the others' sizes at a tap, and how far from it is too far."""
    middle = median(values)
    return middle, max(SIZE_LEAST, SPREADS * _spread(values, middle))


def _furthest(sizes: Sequence[float], usual: Sequence[tuple[float, float]]) -> tuple[int, float] | None:
    """The tap, from 1, at which a batch is too far from the others, and by how much; None if at none."""
    far = [
        (tap, size - middle)
        for tap, (size, (middle, limit)) in enumerate(zip(sizes, usual, strict=True), start=1)
        if abs(size - middle) > limit
    ]
    return max(far, key=lambda one: abs(one[1]), default=None)


def _spread(values: Sequence[float], middle: float) -> float:
    return median(abs(value - middle) for value in values)
