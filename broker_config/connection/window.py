"""The in-flight window: how many messages of one connection may be unacknowledged at once, and how large.

Knows nothing of MQTT. One window serves one connection and is thrown away with it, so that an
acknowledgement that comes late can never free a place in the next connection's window.
"""

import sys
import threading
import time
from collections.abc import Callable

from broker_config.errors import NotConnected, PublishTimeout, TooLarge

_PING_BYTES = 256  # that a ping came and went says nothing of messages


class InFlightWindow:
    """Counts messages in flight, and lets publishers wait for room.

    An acknowledgement may be heard before the sender knows under what number its message went.

    Args:
        size: How many may be in flight, at least 1.
        max_packet_bytes: No larger packet is let in.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        size: int,
        *,
        max_packet_bytes: int = sys.maxsize,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_packet_bytes = max_packet_bytes
        """No larger packet is let in."""
        self.largest_acknowledged = 0
        """Of the packets that were acknowledged after their number was known, in bytes."""
        self._size = size
        self._clock = clock
        self._moved_s = clock()
        self._in_flight = 0
        self._handed: list[int] = []  # bytes of packets whose number is not known yet
        self._sent: dict[int, int] = {}  # of the others
        self._early: set[int] = set()
        self._unsent_bytes = 0
        self._broken = False
        self._changed = threading.Condition()

    @property
    def in_flight(self) -> int:
        """How many messages are unacknowledged now."""
        with self._changed:
            return self._in_flight

    @property
    def largest_unacknowledged(self) -> int:
        """In bytes; 0 for none."""
        with self._changed:
            return max((*self._sent.values(), *self._handed), default=0)

    def stuck_s(self, unsent_bytes: int = 0) -> float:
        """For how long messages have been in flight and nothing has moved; 0 while none is.

        Args:
            unsent_bytes: What has not left this machine: where that changes, a line is slow and not stuck.
        """
        with self._changed:
            before, self._unsent_bytes = self._unsent_bytes, unsent_bytes
            if unsent_bytes != before and max(unsent_bytes, before) > _PING_BYTES:
                self._moved_s = self._clock()
            return self._clock() - self._moved_s if self._in_flight else 0.0

    def acquire(self, timeout_s: float, packet_bytes: int = 0) -> None:
        """Take one place; wait for it up to ``timeout_s``.

        Raises:
            TooLarge: No packet of this size is let in.
            NotConnected: The connection broke, before or while we waited.
            PublishTimeout: The window stayed full.
        """
        if packet_bytes > self.max_packet_bytes:
            raise TooLarge(packet_bytes, self.max_packet_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._broken or self._in_flight < self._size, timeout_s)
            if self._broken:
                raise NotConnected("the connection broke while a message waited to be sent")
            if self._in_flight >= self._size:
                raise PublishTimeout(
                    f"no acknowledgement for {timeout_s:g} s with {self._in_flight} messages in flight: "
                    "the broker is slow or stuck"
                )
            if not self._in_flight:
                self._moved_s = self._clock()
            self._in_flight += 1

    def handed(self, size: int) -> None:
        """A packet that took a place is about to go out, under a number that is not known yet."""
        with self._changed:
            self._handed.append(size)

    def sent(self, number: int, size: int) -> None:
        """It went out."""
        with self._changed:
            self._handed.remove(size)
            if number in self._early:
                self._early.remove(number)
                self.largest_acknowledged = max(self.largest_acknowledged, size)
            else:
                self._sent[number] = size

    def release(self, number: int | None = None) -> None:
        """Give one place back: that packet was acknowledged, or one without a number is done with."""
        with self._changed:
            if number in self._sent:
                self.largest_acknowledged = max(self.largest_acknowledged, self._sent.pop(number))
            elif number is not None:
                self._early.add(number)
            self._in_flight -= 1
            self._moved_s = self._clock()
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False if time runs out or the connection breaks first."""
        with self._changed:
            self._changed.wait_for(lambda: self._broken or self._in_flight == 0, timeout_s)
            return not self._broken and self._in_flight == 0

    def break_off(self) -> None:
        """The connection is gone: everyone who waits is told so, now and in future."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()
