"""What happened, with times: of the whole fleet the last few hundred, of each device the last ten. Pure.

The same thing told again is one event with a count: a device whose every batch is refused does not push out
what happened to the others.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

from metrics.fleet_page.view import EventView, RefusalView

MAX_EVENTS: Final = 300
OF_A_DEVICE: Final = 10
MAX_REFUSALS: Final = 50


class EventLog:
    """Bounded; knows no device that is forgotten."""

    def __init__(self) -> None:
        self.refusals: deque[RefusalView] = deque(maxlen=MAX_REFUSALS)
        """Refused messages, the newest first."""
        self.refused_at: int = 0
        """The revision that brought the newest of them."""
        self._events: deque[EventView] = deque(maxlen=MAX_EVENTS)
        self._devices: dict[tuple[str, str], deque[EventView]] = {}
        self._last_refusals: dict[tuple[str, str], RefusalView] = {}

    def note(self, event: EventView, *, minor: bool = False) -> None:
        """Something happened; what is minor is shown with its device only."""
        if not minor:
            _add(self._events, event)
        if event.device:
            key = event.tier, event.device
            _add(self._devices.setdefault(key, deque(maxlen=OF_A_DEVICE)), event)

    def refuse(self, refusal: RefusalView, revision: int, *, known: bool) -> None:
        """A message was refused, of a device that is ``known`` or of nobody's."""
        self.refusals.appendleft(refusal)
        self.refused_at = revision
        event = EventView(
            at_unix_s=refusal.at_unix_s,
            tier=refusal.tier,
            device=refusal.device,
            kind="refused",
            words=f"{refusal.kind} refused: {refusal.reason}",
            revision=revision,
        )
        if known:
            self._last_refusals[refusal.tier, refusal.device] = refusal
            self.note(event)
        else:
            _add(self._events, event)

    def last_refusal(self, tier: str, device: str) -> RefusalView | None:
        """Of a device."""
        return self._last_refusals.get((tier, device))

    def since(self, revision: int) -> tuple[EventView, ...]:
        """What is newer than a revision, the oldest first."""
        return tuple(one for one in self._events if one.revision > revision)

    def of(self, tier: str, device: str) -> tuple[EventView, ...]:
        """A device's last ones, the newest first."""
        return tuple(reversed(self._devices.get((tier, device), ())))

    def forget(self, tier: str, device: str) -> None:
        """Keep nothing more about a device than what happened in the fleet."""
        self._devices.pop((tier, device), None)
        self._last_refusals.pop((tier, device), None)


def _add(events: deque[EventView], event: EventView) -> None:
    """Append; what the same device said in the same words among the last ones moves up, with its count.

    Of the versions that a device used the last one is told.
    """
    for place in range(len(events) - 1, max(-1, len(events) - 1 - OF_A_DEVICE), -1):
        old = events[place]
        same = (old.tier, old.device, old.kind) == (event.tier, event.device, event.kind)
        if same and (old.words == event.words or event.kind == "version"):
            del events[place]
            count = old.count + 1 if old.words == event.words else 1
            event = msgspec.structs.replace(event, count=count)
            break
    events.append(event)
