"""Runs ``sidestream`` by a clock of its own: ``python -m benchmarks.fault_clock FILE ARGUMENTS…``.

FILE says by how many seconds the wall clock is off, and how many times as fast all clocks run; it is read
again ten times a second. Waits of the operating system are not shortened: only what is computed from a clock
sees the other time, which includes every deadline, retry and backoff of ours.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Final

from sidestream.cli import main as sidestream

_LOOK_S: Final = 0.1


class Clock:
    """Stands in for those of :mod:`time`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._monotonic, self._time = time.monotonic, time.time
        self._since, self._ahead_s = self._monotonic(), 0.0
        self._off_s, self._rate = 0.0, 1.0
        self.look()

    def install(self) -> None:
        """Take over for this process."""
        time.monotonic = self.monotonic
        time.time = self.time
        time.time_ns = lambda: int(self.time() * 1e9)
        threading.Thread(target=self._follow, daemon=True).start()

    def monotonic(self) -> float:
        return self._monotonic() + self._gained()

    def time(self) -> float:
        return self._time() + self._gained() + self._off_s

    def look(self) -> None:
        """Go by what the file says now."""
        off_s, rate = map(float, self._file.read_text().split())
        if rate != self._rate:
            self._ahead_s, self._since, self._rate = self._gained(), self._monotonic(), rate
        self._off_s = off_s

    def _gained(self) -> float:
        return self._ahead_s + (self._monotonic() - self._since) * (self._rate - 1)

    def _follow(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            try:
                self.look()
            except ValueError:
                continue  # it is being written


def main(arguments: list[str]) -> int:
    """Set the clock, and run the command."""
    Clock(Path(arguments[0])).install()
    return sidestream(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
