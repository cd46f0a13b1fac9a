"""Which device sends what no honest one would: valid in form, and nothing like the fleet's.

Two figures of each batch, held against those of the tier's other devices, each device counting once however
much it sends:

- the **size** of its activations. The backbone's fingerprint is the same on all, so this hardly differs
  between honest devices, whatever their data: within 0.15 in the logarithm, on skewed data (label
  distributions drawn from a Dirichlet of 0.1).
- the **loss** before the batch is learnt. A device with rare labels has more of it than others, for a while
  and not by much; activations or labels that mean nothing have as much as guessing, for ever.

Nothing is judged before enough other devices are known. Robust statistics only: medians, and the median
distance from them. Pure: no clock, no journal.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from itertools import islice
from statistics import median
from typing import Final

LEAST_DEVICES: Final = 3
"""Other devices of the tier that it takes to judge one."""
SIZE_BATCHES: Final = 3
"""Its last so many batches must be of another size."""
SIZE_LEAST: Final = 1.0
"""By at least so much in the natural logarithm: a factor of 2.7."""
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
_MOST_DEVICES: Final = 10_000


class _Device:
    def __init__(self) -> None:
        self.sizes: deque[float] = deque(maxlen=SIZE_BATCHES)
        self.losses: deque[float] = deque(maxlen=_RECENT)
        self.excesses: deque[float] = deque(maxlen=LOSS_BATCHES)


class Suspicion:
    """Remembers the last few batches of each device. Safe between threads."""

    def __init__(self) -> None:
        self._devices: OrderedDict[tuple[str, str], _Device] = OrderedDict()
        self._lock = threading.Lock()

    def note_size(self, tier: str, device: str, root_mean_square: float) -> str:
        """Take in the size of a batch's activations; return why the device is suspect, or nothing."""
        with self._lock:
            own = self._device(tier, device)
            own.sizes.append(math.log(max(root_mean_square, 1e-30)))
            others = [median(one.sizes) for one in self._others(tier, device) if one.sizes]
            if len(others) < LEAST_DEVICES or len(own.sizes) < SIZE_BATCHES:
                return ""
            middle = median(others)
            limit = max(SIZE_LEAST, SPREADS * _spread(others, middle))
            if min(abs(size - middle) for size in own.sizes) <= limit:
                return ""
            return (
                f"its activations are {math.exp(median(own.sizes) - middle):.3g} times as large as those of "
                f"the tier's other devices"
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

    def _device(self, tier: str, device: str) -> _Device:
        own = self._devices.setdefault((tier, device), _Device())
        self._devices.move_to_end((tier, device))
        if len(self._devices) > _MOST_DEVICES:
            self._devices.popitem(last=False)
        return own

    def _others(self, tier: str, device: str) -> list[_Device]:
        """Those heard last: enough for a median, however large the fleet."""
        found = (one for key, one in reversed(self._devices.items()) if key[0] == tier and key[1] != device)
        return list(islice(found, _COMPARED))


def _spread(values: list[float], middle: float) -> float:
    return median(abs(value - middle) for value in values)
