"""How often the same trouble is worth a warning: at first, and then now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class NowAndThen:
    """Belongs to one thread.

    Args:
        every_s: Between two warnings of the same trouble.
        clock: Seconds that only rise.
    """

    def __init__(self, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._told_s: float | None = None

    def level(self) -> int:
        """It goes wrong: the level to log that at."""
        now = self._clock()
        if self._told_s is not None and now - self._told_s < self._every_s:
            return logging.DEBUG
        self._told_s = now
        return logging.WARNING

    def over(self) -> bool:
        """It went well; whether that is news."""
        told, self._told_s = self._told_s is not None, None
        return told
