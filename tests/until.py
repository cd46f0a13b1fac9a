"""How a test waits: for a condition, and long enough for a machine that does ten other things."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

PATIENCE_S: Final = 120.0


class Clock:
    """The machine's clock, and as far ahead of it as a test has moved it."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._ahead_s

    def forward(self, seconds: float) -> None:
        """Let so much time pass."""
        self._ahead_s += seconds

    def until(self, condition: Callable[[], object], what: str = "it") -> None:
        """Wait for a condition while time flies: a second at every look.

        Raises:
            AssertionError: it has not come.
        """

        def later() -> object:
            self.forward(1.0)
            return condition()

        until(later, what)


def until(
    condition: Callable[[], object],
    what: str = "it",
    timeout_s: float = PATIENCE_S,
    *,
    every_s: float = 0.02,
) -> None:
    """Wait for a condition, looking every so often.

    Raises:
        AssertionError: it has not come.
    """
    deadline_s, never = time.monotonic() + timeout_s, threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain: {what}"
        never.wait(every_s)
