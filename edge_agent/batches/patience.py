"""Writing to a disk that is full for now, and waiting, as long as nobody stops it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from edge_agent.batches.side_tasks import SideTasks
from sidestream.contract.errors import StorageError

_LOOK_S = 0.5  # whoever stops us may not be able to wake us
_RETRY_S = 2.0
T = TypeVar("T")
log = logging.getLogger(__name__)


class Patience:
    """Of the thread that computes.

    Args:
        what: What waits for the disk, in words.
        stopped: Asked often; true ends all waiting.
        side_tasks: Have their turns meanwhile.
    """

    def __init__(self, what: str, stopped: Callable[[], bool], side_tasks: SideTasks) -> None:
        self.stopped = stopped
        """Whether it is over."""
        self._what = what
        self._side_tasks = side_tasks

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

    def between(self) -> None:
        """Give each side task a turn: something was done, and more is to be."""
        self._side_tasks.run()

    def pause(self, seconds: float) -> None:
        """Do nothing but side tasks for so long."""
        until_s = time.monotonic() + seconds
        while not self.stopped() and (left_s := until_s - time.monotonic()) > 0:
            self._side_tasks.wait(min(_LOOK_S, left_s))

    def wait(self, seconds: float) -> None:
        """The same, until somebody wakes us."""
        self._side_tasks.wait(min(_LOOK_S, seconds))
