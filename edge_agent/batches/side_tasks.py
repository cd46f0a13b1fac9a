"""What the thread that computes does beside computing: between forward passes, and while it waits.

Adopting weights, measuring them and taking up late labels are short. A thread for each would take turns with
the forward passes on a small board's processor anyway, and hold memory that these do not need.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

NOT_DUE = 3600.0
"""What a task says that waits for somebody to wake it."""
Task: TypeAlias = Callable[[], float]
"""Does one piece of its work, if there is any; returns the seconds until it has more, 0 for at once."""


class SideTasks:
    """The tasks, in the order in which they were added.

    :meth:`wake` and :meth:`add` may be called from any thread, the rest belongs to the one that computes.
    """

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._news = threading.Event()

    def add(self, task: Task) -> None:
        """One more."""
        self._tasks.append(task)
        self._news.set()

    def wake(self) -> None:
        """There is something to do: :meth:`wait` returns."""
        self._news.set()

    def run(self) -> float:
        """Give each task one turn; return the seconds until one of them has more to do."""
        self._news.clear()
        return min([task() for task in list(self._tasks)], default=NOT_DUE)

    def wait(self, timeout_s: float) -> None:
        """Give each task its turns until somebody woke us, or for so long."""
        due_s = self.run()
        self._news.wait(min(due_s, timeout_s))
