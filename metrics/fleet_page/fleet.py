"""The trainer's view of its devices, from what they say of themselves.

Pure: no clock (the caller passes ``now``, in seconds of any monotonic clock), no lock, no broker. Bounded: so
many devices, and for each a few kilobytes at most.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, KeysView
from dataclasses import dataclass
from typing import Final

from metrics.fleet_page.summary import Counts, Heard, TierSummary, summed, together
from sidestream.contract.errors import MismatchError
from sidestream.contract.messages import COUNTERS, Status, Telemetry

MAX_DEVICES: Final = 20_000
"""Each takes six kilobytes or so of the trainer's memory."""
SILENT_AFTER_S: Final = 120.0
GOODBYE: Final = "goodbye"
"""The reason in the Status of an agent that was stopped in order."""


class State(str, enum.Enum):
    """What a device is up to."""

    ONLINE = "online"
    """It is there."""
    FINISHED = "finished"
    """Its data has ended and every batch is receipted; it is there, or has taken leave."""
    SILENT = "silent"
    """It was there and never said that it leaves, but has not been heard of for long."""
    LOST = "lost"
    """Its connection was lost, or it ended with an error."""
    GONE = "gone"
    """It was stopped in order, before its data had ended."""

    @property
    def troubled(self) -> bool:
        """Whether a device has vanished."""
        return self in (State.SILENT, State.LOST)


_HERE: Final = State.ONLINE, True
_DONE: Final = State.FINISHED, True
_LEFT: Final = State.FINISHED, False
_SILENT: Final = State.SILENT, False
_LOST: Final = State.LOST, False
_GONE: Final = State.GONE, False


def advance(total: Counts, seen: Counts, told: Telemetry) -> None:
    """Add what ``told`` reports beyond ``seen``, and raise ``seen`` to it. Nothing ever falls."""
    for name in COUNTERS:
        grown = getattr(told, name) - seen[name]
        if grown > 0:
            total[name] += grown
            seen[name] += grown


@dataclass(kw_only=True)
class Device:
    """What is known of one device."""

    tier: str
    """Its hardware tier."""
    name: str
    """Its id."""
    heard: float
    """When it last sent something."""
    first_heard: float = 0.0
    """When it first did, in its present life."""
    waited: float = 0.0
    """When it last said that it waits for something."""
    announced: bool = False
    """Whether its last valid Status said online."""
    birth: int = -1
    """Of that Status; -1 before the first."""
    stream: str = ""
    """Of that Status."""
    software: str = ""
    """The agent's version."""
    reason: str = ""
    """Why it went offline."""
    telemetry: Telemetry | None = None
    """The last."""
    clock_off_s: float = 0.0
    """How far its clock was ahead of ours when it said that, where it tells the time."""
    fingerprint: str = ""
    """Of its backbone, as it said last."""
    undelivered: str = ""
    """What is said to be sent and does not arrive, in words."""
    certificate_expires_unix_s: float = 0.0
    """When its certificate ends; 0 without one."""


class Fleet:
    """Devices of a closed set of tiers, their last words, and sums that outlive them.

    Args:
        tiers: The plan's tier names.
        max_devices: When one more appears, the offline one that has been silent longest is forgotten.
        silent_after_s: A device that says nothing for so long is not online, will or no will.
    """

    def __init__(
        self, tiers: Iterable[str], *, max_devices: int = MAX_DEVICES, silent_after_s: float = SILENT_AFTER_S
    ) -> None:
        self.held: Callable[[str], bool] = lambda device: False
        """Whether a device is in quarantine: what it measures counts for nothing."""
        self._tiers = tuple(sorted(set(tiers)))
        self._max_devices = max_devices
        self._silent_after_s = silent_after_s
        self._devices: dict[tuple[str, str], Device] = {}
        # Whoever was heard longest ago stands first: those who said that they are here, and all others.
        self._here: OrderedDict[tuple[str, str], Device] = OrderedDict()
        self._left: OrderedDict[tuple[str, str], Device] = OrderedDict()
        self._totals = {tier: Counts() for tier in self._tiers}
        # Counters live as long as an outbox. By its stream they survive a device's new outbox, and are not
        # mixed up when a cloned disk makes two devices share a name.
        self._seen: OrderedDict[tuple[str, str], Counts] = OrderedDict()

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tier names, sorted."""
        return self._tiers

    def add_tiers(self, tiers: Iterable[str]) -> None:
        """Let more tiers take part; those that do go on as they are."""
        for tier in tiers:
            self._totals.setdefault(tier, Counts())
        self._tiers = tuple(sorted(self._totals))

    def on_status(self, tier: str, device: str, status: Status, now: float) -> bool:
        """Take a birth or a death; return False if it is a stale one and changes nothing.

        Raises:
            MismatchError: if the plan has no such tier.
        """
        known = self._devices.get((tier, device))
        if known is not None and _stale(known, status):
            return False
        entry = self._entry(tier, device, now)
        entry.announced = status.state == "online"
        self._file(entry)
        if entry.announced and (entry.birth, entry.stream) != (status.birth, status.stream):
            entry.first_heard = now
        entry.birth, entry.stream = status.birth, status.stream
        entry.software, entry.reason = status.software, status.reason
        entry.fingerprint = status.fingerprint or entry.fingerprint
        entry.certificate_expires_unix_s = status.certificate_expires_unix_s
        return True

    def was_told(self, tier: str, device: str, status: Status) -> bool:
        """Whether a status is the last one that was taken of its device, once more."""
        known = self._devices.get((tier, device))
        told = status.birth, status.stream, status.state == "online"
        return known is not None and (known.birth, known.stream, known.announced) == told

    def on_telemetry(
        self, tier: str, device: str, telemetry: Telemetry, now: float, *, unix_s: float = 0.0
    ) -> None:
        """Take a device's report; ``unix_s`` is the time, where it is to be held against the device's.

        Raises:
            MismatchError: if the plan has no such tier.
        """
        entry = self._entry(tier, device, now)
        entry.telemetry = telemetry
        if telemetry.trouble:
            entry.waited = now
        entry.clock_off_s = telemetry.unix_s - unix_s if telemetry.unix_s and unix_s else 0.0
        seen = self._seen.setdefault((tier, telemetry.stream), Counts())
        self._seen.move_to_end((tier, telemetry.stream))
        if len(self._seen) > 2 * self._max_devices:
            self._seen.popitem(last=False)
        advance(self._totals[tier], seen, telemetry)

    def set_undelivered(self, tier: str, device: str, what: str) -> None:
        """Note what of a device does not arrive; nothing, if all does."""
        if (entry := self._devices.get((tier, device))) is not None:
            entry.undelivered = what

    def online(self, device: Device, now: float) -> bool:
        """Whether a device is there."""
        return device.announced and now - device.heard <= self._silent_after_s

    def state(self, device: Device, now: float) -> State:
        """What a device is up to."""
        return self.presence(device, now)[0]

    def presence(self, device: Device, now: float) -> tuple[State, bool]:
        """What a device is up to, and whether it is there."""
        if self.online(device, now):
            return _DONE if _finished(device) else _HERE
        if device.announced:
            return _SILENT
        if device.reason != GOODBYE:
            return _LOST
        return _LEFT if _finished(device) else _GONE

    def forget(self, tier: str, device: str) -> bool:
        """Strike a device off the list, such as one that was taken out of service; its sums stay.

        Returns:
            Whether it was known.
        """
        self._here.pop((tier, device), None)
        self._left.pop((tier, device), None)
        return self._devices.pop((tier, device), None) is not None

    def devices(self, tier: str | None = None) -> list[Device]:
        """Known devices, of one tier or all, by tier and name."""
        return [entry for _, entry in sorted(self._devices.items()) if tier in (None, entry.tier)]

    @property
    def known(self) -> KeysView[tuple[str, str]]:
        """Tier and name of every known device."""
        return self._devices.keys()

    def by_age(self) -> Iterator[Device]:
        """Known devices, the one that has been known longest first."""
        return iter(self._devices.values())

    def summary(self, now: float, tier: str | None = None) -> TierSummary:
        """One tier, or the whole fleet."""
        summaries = self.summaries(now)
        return summaries[tier] if tier is not None else together(summaries.values())

    def summaries(self, now: float) -> dict[str, TierSummary]:
        """Every tier, in order of name; each device is looked at once."""
        heard: dict[str, list[Heard]] = {tier: [] for tier in self._tiers}
        for entry in self._devices.values():
            state, online = self.presence(entry, now)
            # What a device measures on nonsense says nothing of the weights.
            judges = (online or state is State.FINISHED) and not self.held(entry.name)
            heard[entry.tier].append(Heard(entry.telemetry, online, state.troubled, judges))
        return {tier: summed(devices, self._totals[tier]) for tier, devices in heard.items()}

    def _entry(self, tier: str, device: str, now: float) -> Device:
        if tier not in self._totals:
            raise MismatchError(f"the plan has no tier {tier!r}")
        entry = self._devices.get((tier, device))
        if entry is None:
            if len(self._devices) >= self._max_devices:
                oldest = self._longest_gone(now)
                self.forget(oldest.tier, oldest.name)
            entry = self._devices[tier, device] = Device(tier=tier, name=device, heard=now, first_heard=now)
        entry.heard = max(entry.heard, now)
        self._file(entry)
        return entry

    def _file(self, entry: Device) -> None:
        """Keep both lists in order: whoever was heard last stands last."""
        key = entry.tier, entry.name
        to, other = (self._here, self._left) if entry.announced else (self._left, self._here)
        other.pop(key, None)
        to[key] = entry
        to.move_to_end(key)

    def _longest_gone(self, now: float) -> Device:
        """Of those that are not online the one that was heard longest ago; of all, if they all are."""
        firsts = [next(iter(some.values())) for some in (self._here, self._left) if some]
        return min(firsts, key=lambda one: (self.online(one, now), one.heard))


def _finished(device: Device) -> bool:
    return device.telemetry is not None and device.telemetry.finished


def _stale(known: Device, status: Status) -> bool:
    """Whether a status is older than what is known.

    Births count up within a stream. A death from another stream than the living one's is the late will of an
    agent whose state was reset; a birth from another stream is a new life.
    """
    if known.birth < 0:
        return False
    if status.stream == known.stream:
        return status.birth < known.birth
    return status.state == "offline" and known.announced
