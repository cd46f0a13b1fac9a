"""How fast one device may send. Pure: the caller brings the clock."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from metrics.fleet_page.fleet import MAX_DEVICES

_BURST_S: Final = 5.0


class RateLimit:
    """A token bucket for each device.

    Args:
        per_s: Messages a second; five seconds' worth may come at once. 0 for no limit.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Tokens left, and when that was."""

    def allows(self, device: str, now: float) -> bool:
        """Count a message of a device; return whether it may be taken."""
        if not self._per_s:
            return True
        full = max(1.0, self._per_s * _BURST_S)
        left, then = self._buckets.get(device, (full, now))
        left = min(full, left + (now - then) * self._per_s)
        allowed = left >= 1.0
        self._buckets[device] = (left - 1.0 if allowed else left, now)
        self._buckets.move_to_end(device)
        if len(self._buckets) > MAX_DEVICES:
            self._buckets.popitem(last=False)
        return allowed
