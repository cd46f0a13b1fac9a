"""Where network callbacks leave what they heard: the newest message of each topic, bounded.

Every topic an agent listens to carries a state (plan, receipt, flow, weights), so that only its newest
message matters: a burst costs no memory, and a slow device skips versions that are already outdated. Receipts
speak of several streams on one topic: of each stream the newest matters.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from broker_config.transport import Connected, Disconnected, Event, Received

MAX_BYTES = 64 * 1024 * 1024
MAX_TOPICS = 4096
_CONNECTION = ""  # no topic is empty


class Mailbox:
    """Put from any thread, take from one.

    Args:
        about: What a message is about beside its topic; one about something else does not replace it.
    """

    def __init__(self, about: Callable[[Received], str] = lambda _: "") -> None:
        self._about = about
        self._counts: Counter[str] = Counter()
        self._newest: dict[tuple[str, str], Event] = {}
        self._bytes = 0
        self._woken = False
        self._filled = threading.Condition()

    def put(self, event: Event) -> None:
        """Take in an event; never blocks."""
        key, size = self._key(event), _size(event)
        with self._filled:
            self._counts["bytes_down"] += size
            replaced = self._newest.get(key)
            total = self._bytes + size - (_size(replaced) if replaced else 0)
            if total > MAX_BYTES or (replaced is None and len(self._newest) >= MAX_TOPICS):
                self._counts["messages_dropped"] += 1
                return
            self._newest.pop(key, None)
            self._newest[key] = event  # at the end: events are taken in the order of their last coming
            self._bytes = total
            self._filled.notify()

    def wake(self) -> None:
        """There is something else to do: :meth:`take` returns."""
        with self._filled:
            self._woken = True
            self._filled.notify()

    def take(self, timeout_s: float) -> list[Event]:
        """Everything new, oldest first; waits up to ``timeout_s`` for something."""
        with self._filled:
            self._filled.wait_for(lambda: self._newest or self._woken, timeout_s)
            self._woken = False
            events = list(self._newest.values())
            self._newest.clear()
            self._bytes = 0
            return events

    def counts(self) -> Counter[str]:
        """Bytes that came, and messages that found no room, since it was last asked; as in Telemetry."""
        with self._filled:
            counts, self._counts = self._counts, Counter()
            return counts

    def _key(self, event: Event) -> tuple[str, str]:
        return (event.topic, self._about(event)) if isinstance(event, Received) else (_CONNECTION, "")


def _size(event: Event) -> int:
    assert isinstance(event, Received | Connected | Disconnected)
    return len(event.payload) if isinstance(event, Received) else 0
