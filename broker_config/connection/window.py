"""The in-flight window: how many messages of one connection may be unacknowledged at once.

Knows nothing of MQTT. One window serves one connection and is thrown away with it, so that an
acknowledgement that comes late can never free a place in the next connection's window.
"""

import threading
import time
from collections.abc import Callable

from broker_config.errors import NotConnected, PublishTimeout


class InFlightWindow:
    """Counts messages in flight, and lets publishers wait for room.

    Args:
        size: How many may be in flight, at least 1.
        clock: Seconds that only rise.
    """

    def __init__(self, size: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.size = size
        self._clock = clock
        self._moved_s = clock()
        self._in_flight = 0
        self._broken = False
        self._changed = threading.Condition()

    @property
    def in_flight(self) -> int:
        """How many messages are unacknowledged now."""
        with self._changed:
            return self._in_flight

    @property
    def stuck_s(self) -> float:
        """For how long messages have been in flight and nothing has moved; 0 while none is."""
        with self._changed:
            return self._clock() - self._moved_s if self._in_flight else 0.0

    def moved(self) -> None:
        """What is in flight is on its way still: some of it has left this machine."""
        with self._changed:
            self._moved_s = self._clock()

    def acquire(self, timeout_s: float) -> None:
        """Take one place; wait for it up to ``timeout_s``.

        Raises:
            NotConnected: The connection broke, before or while we waited.
            PublishTimeout: The window stayed full.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._broken or self._in_flight < self.size, timeout_s)
            if self._broken:
                raise NotConnected("the connection broke while a message waited to be sent")
            if self._in_flight >= self.size:
                raise PublishTimeout(
                    f"no acknowledgement for {timeout_s:g} s with {self._in_flight} messages in flight: "
                    "the broker is slow or stuck"
                )
            if not self._in_flight:
                self._moved_s = self._clock()
            self._in_flight += 1

    def release(self) -> None:
        """Give one place back: a message was acknowledged, or could not be sent after all."""
        with self._changed:
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
