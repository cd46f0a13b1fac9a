"""Writing to a disk that is full for now, and waiting, as long as nobody stops it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sidestream.contract.errors import StorageError

_WAIT_S = 0.1
_RETRY_S = 2.0
T = TypeVar("T")
log = logging.getLogger(__name__)


class Patience:
    """Of one thread.

    Args:
        what: What waits for the disk, in words.
        stopped: Asked often; true ends all waiting.
    """

    def __init__(self, what: str, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped
        """Whether it is over."""
        self._what = what

    def write(self, write: Callable[[], T]) -> tuple[T, ...]:
        """Write; where the disk cannot take it, wait and try again.

        Returns:
            What ``write`` returned, alone; nothing if we were stopped before that.
        """
        told = False
        while True:
            try:
                return (write(),)
            except StorageError as exc:
                if not told:
                    log.error("%s; %s until then, and nothing is lost", exc, self._what)
                told = True
            if self.stopped():
                return ()
            self.pause(_RETRY_S)

    def pause(self, seconds: float) -> None:
        """Do nothing for so long."""
        until_s = time.monotonic() + seconds
        while not self.stopped() and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(_WAIT_S, left_s))
