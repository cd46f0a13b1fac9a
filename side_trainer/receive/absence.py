"""Devices of which some words arrive and others do not, though they say that they send them.

A broker that speaks MQTT 3.1.1 acknowledges what its access list throws away, so a device that may write some
of its topics and not others does not know. Here it is seen by what is missing: telemetry that tells of
batches sent while none comes, and batches that come while telemetry never does. Pure: no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from metrics.fleet_page.fleet import MAX_DEVICES

NO_BATCHES_S: Final = 120.0
"""Telemetry tells of new batches for so long, and none has come since."""
NO_TELEMETRY_S: Final = 900.0
"""Batches have come for so long, and no telemetry: a device with a thin link sends it rarely."""
_LEAST_TOLD: Final = 3
_REMEDY: Final = (
    "the broker may throw away what it acknowledges. Compare device and tier in its settings with those that "
    "the access list was written for (sidestream fleet list, sidestream doctor on the device), and have the "
    "broker read its list again"
)


class _Heard:
    def __init__(self, now: float) -> None:
        self.telemetry = now
        """When the last came, or the first word of any kind."""
        self.sent: int | None = None
        """What the first telemetry since the last batch said was sent by then."""
        self.telling = 0
        """How many since then told of more,"""
        self.since = now
        """and when the first of them did."""
        self.batches = 0
        """Since the last telemetry."""
        self.told = ""
        self.wrong = ""
        """What does not arrive, in words; nothing if all does."""


class Absences:
    """Belongs to one thread."""

    def __init__(self) -> None:
        self._devices: OrderedDict[tuple[str, str], _Heard] = OrderedDict()

    def on_batch(self, tier: str, device: str, now: float) -> str:
        """A batch came, whatever is in it; return what is wrong, once, or nothing."""
        heard = self._heard(tier, device, now)
        heard.sent, heard.telling = None, 0
        heard.batches += 1
        heard.wrong = ""
        if heard.batches < _LEAST_TOLD or now - heard.telemetry <= NO_TELEMETRY_S:
            return ""
        minutes = (now - heard.telemetry) / 60
        return self._once(heard, f"sends batches, and no telemetry of it has come for {minutes:.0f} minutes")

    def on_telemetry(self, tier: str, device: str, batches_sent: int, now: float) -> str:
        """Telemetry came; return what is wrong, once, or nothing."""
        heard = self._heard(tier, device, now)
        heard.telemetry, heard.batches = now, 0
        if heard.sent is None:
            heard.sent = batches_sent
        elif batches_sent > heard.sent:
            heard.since = heard.since if heard.telling else now
            heard.sent, heard.telling = batches_sent, heard.telling + 1
        seconds, heard.wrong = now - heard.since, ""
        if heard.telling < _LEAST_TOLD or seconds <= NO_BATCHES_S:
            return ""
        return self._once(heard, f"says that it sends batches, and none has come for {seconds:.0f} s")

    def wrong(self, tier: str, device: str) -> str:
        """What of a device does not arrive, in words; nothing if all does."""
        heard = self._devices.get((tier, device))
        return heard.wrong if heard is not None else ""

    def disconnected(self) -> None:
        """Nothing was heard for a while, and that was not the devices' fault."""
        self._devices.clear()

    def _heard(self, tier: str, device: str, now: float) -> _Heard:
        heard = self._devices.setdefault((tier, device), _Heard(now))
        self._devices.move_to_end((tier, device))
        if len(self._devices) > MAX_DEVICES:
            self._devices.popitem(last=False)
        return heard

    @staticmethod
    def _once(heard: _Heard, what: str) -> str:
        heard.wrong = what
        kind = what.split(",")[0]
        if heard.told == kind:
            return ""
        heard.told = kind
        return f"{what}: {_REMEDY}"
