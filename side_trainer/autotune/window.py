"""What a device told of itself over a while, summed up. Pure: knows no clock and no network.

Counters run over the life of an outbox, or of an agent's process: where one falls, a window begins anew. It
does, too, where the device goes by another assignment than the one it is to be judged under, and after a
silence of half a window.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from sidestream.contract.messages import Telemetry

_LEAST_SAMPLES: Final = 16
_HOT_SHARE: Final = 0.1
"""For so much of the time a board may be hotter than what is called its temperature."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One window. What a device does not tell is None."""

    samples: int
    """That were forwarded."""
    sample_s: float | None
    """Seconds of forward pass a sample; None where there were too few to say."""
    memory: float | None
    """The largest share that the agent had of its own and the free memory."""
    celsius: float | None
    """What the board's temperature exceeded a tenth of the time."""
    sending: float | None
    """The share of the time in which something was on its way."""
    outbox: float | None
    """How full the outbox was at the end, 0 to 1."""


@dataclass(kw_only=True)
class _Open:
    """A window that is not over."""

    first: Telemetry
    first_s: float
    last: Telemetry
    last_s: float
    memory: float | None = None
    degrees: Counter[int] = field(default_factory=Counter)


class Meter:
    """Sums up one device's telemetry.

    Args:
        window_s: How long a window is.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._open: _Open | None = None

    def add(self, told: Telemetry, now: float, version: int) -> Measured | None:
        """Take a report; return the window that it completes, if it completes one.

        Args:
            told: The report.
            now: Seconds of a clock that only rises.
            version: Of the assignment that the device is to be judged under.
        """
        if told.assignment != version:
            self._open = None
            return None
        window = self._open
        if window is None or _has_fallen(window.last, told) or now - window.last_s > self._window_s / 2:
            self._open = window = _Open(first=told, first_s=now, last=told, last_s=now)
        else:
            window.last, window.last_s = told, now
        if told.memory_free_bytes and told.rss_bytes:
            share = told.rss_bytes / (told.rss_bytes + told.memory_free_bytes)
            window.memory = max(share, window.memory or 0.0)
        if told.temperature_celsius is not None:
            window.degrees[math.ceil(min(max(told.temperature_celsius, -60), 200))] += 1
        if now - window.first_s < self._window_s:
            return None
        self._open = _Open(first=told, first_s=now, last=told, last_s=now)
        return _summed(window)


def _has_fallen(before: Telemetry, told: Telemetry) -> bool:
    names = ("samples_forwarded", "forward_seconds", "sending_seconds")
    return before.stream != told.stream or any(getattr(told, name) < getattr(before, name) for name in names)


def _summed(window: _Open) -> Measured:
    first, last = window.first, window.last
    samples = last.samples_forwarded - first.samples_forwarded
    forward_s = last.forward_seconds - first.forward_seconds
    sending_s = last.sending_seconds - first.sending_seconds
    told_sending = last.sending_seconds > 0
    enough = samples >= _LEAST_SAMPLES
    most = last.outbox_max_bytes
    return Measured(
        samples=samples,
        sample_s=forward_s / samples if enough else None,
        memory=window.memory,
        celsius=_hot(window.degrees),
        sending=min(1.0, sending_s / (window.last_s - window.first_s)) if told_sending else None,
        outbox=min(1.0, last.outbox_bytes / most) if most else None,
    )


def _hot(degrees: Counter[int]) -> float | None:
    """The lowest temperature that was exceeded in at most a tenth of the reports."""
    above = degrees.total()
    if not above:
        return None
    allowed = _HOT_SHARE * above
    for degree in sorted(degrees):
        above -= degrees[degree]
        if above <= allowed:
            return float(degree)
    raise AssertionError("nothing is above the highest")
