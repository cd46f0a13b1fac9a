"""Runs ``sidestream`` up to an exact point: ``python -m benchmarks.fault_points POINT:N ARGUMENTS…``.

The process kills itself (SIGKILL) the N-th time that it comes to the point. Points are named here and found
by Python's profiler, so the product has no hook for them. A point that no longer exists never fires, and
whoever waits for the death sees that.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from sidestream.cli import main as sidestream

NOTE: Final = "SIDESTREAM_FAULT_NOTE"
"""Environment variable: where the sizes of a database and its WAL before a commit are written."""


@dataclass(frozen=True)
class Point:
    """A moment in the life of a process."""

    file: str
    """Source file, with the room it stands in."""
    function: str
    """Function in it."""
    event: str
    """Of the profiler: the function is entered, or it calls something written in C, or has called it."""
    called: str = ""
    """What that is."""


POINTS: Final = {
    # trainer: the batches are journaled, and no receipt has gone out
    "journaled": Point("broadcast/downlink.py", "receipt", "call"),
    # trainer: the weights' chunks or manifest are about to go
    "publishing": Point("broadcast/publisher.py", "_publish_tier", "call"),
    # trainer: a checkpoint is written and not yet synced; and one has just taken its name
    "checkpoint-written": Point("host/state_dir.py", "write_atomically", "c_call", "fsync"),
    "checkpoint-named": Point("fold/checkpoint.py", "newest_files", "call"),
    # agent: a batch is in the outbox and not sent; sent and not receipted; receipted and not deleted
    "appended": Point("uplink/link_state.py", "wake", "call"),
    "sent": Point("connection/window.py", "release", "call"),
    "receipted": Point("store/streams.py", "receipt", "call"),
    # either: within a commit, whose pages may or may not have reached the disk
    "journal-commit": Point("journal/file.py", "transaction", "c_return", "execute"),
    "outbox-commit": Point("store/outbox_file.py", "transaction", "c_return", "execute"),
}


class Watch:
    """A profiler that counts how often a point is reached, and kills at the N-th time."""

    def __init__(self, point: Point, at: int) -> None:
        self._point = point
        self._left = at
        self._calls: Counter[int] = Counter()
        self._lock = threading.Lock()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        point, code = self._point, frame.f_code
        if code.co_name != point.function or not code.co_filename.endswith(f"/{point.file}"):
            return
        if point.called and getattr(argument, "__name__", "") != point.called:
            return
        if point.function == "transaction":
            self._in_commit(frame, event)
        elif event == point.event:
            self._reached()

    def _in_commit(self, frame: FrameType, event: str) -> None:
        """``execute`` within a transaction's own frame: BEGIN first, COMMIT when the block has ended."""
        holder = frame.f_locals["self"]
        if event == "c_call":
            self._calls[id(holder)] += 1
        if self._calls[id(holder)] % 2:
            return
        if event == "c_call":
            _note_sizes(holder)
        elif event == "c_return":
            self._reached()

    def _reached(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _note_sizes(holder: Any) -> None:
    """What is on disk for certain: the WAL up to here was synced by the commit before."""
    wal = holder.path.with_name(holder.path.name + "-wal")
    size = wal.stat().st_size if wal.exists() else 0
    Path(os.environ[NOTE]).write_text(json.dumps({"wal": str(wal), "synced": size}))


def main(arguments: list[str], run: Callable[[list[str]], int] = sidestream) -> int:
    """Watch for the point, and run the command."""
    name, _, count = arguments[0].partition(":")
    watch = Watch(POINTS[name], int(count or 1))
    threading.setprofile(watch)
    sys.setprofile(watch)
    return run(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
