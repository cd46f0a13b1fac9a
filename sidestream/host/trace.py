"""What a process did when, for a timeline: spans in wall-clock microseconds, a JSON object a line.

Wall-clock time, so that the files of several processes of one machine go on one axis. The plain
:class:`Trace` writes nothing and is what runs unless somebody asks for a file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sidestream.contract.errors import ConfigError

_log = logging.getLogger(__name__)


class Trace:
    """Takes spans and forgets them."""

    def now(self) -> int:
        """The start or end of a span."""
        return 0

    def add(self, name: str, lane: str, start: int, end: int | None = None, **about: object) -> None:
        """Note a span.

        Args:
            name: What was done.
            lane: Where it is drawn; spans of one lane do not overlap.
            start: From :meth:`now`.
            end: From :meth:`now`; default: now.
            **about: Details, such as a batch's number; never content.
        """


class TraceFile(Trace):
    """Appends spans to a file. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()

    def now(self) -> int:
        return time.time_ns() // 1000

    def add(self, name: str, lane: str, start: int, end: int | None = None, **about: object) -> None:
        length = max(0, (self.now() if end is None else end) - start)
        line = json.dumps({"name": name, "lane": lane, "ts": start, "dur": length, "about": about})
        with self._lock:
            if self._file.closed:
                return
            try:
                self._file.write(line + "\n")
            except OSError as exc:
                _log.error("the trace ends here: %s", exc)
                with contextlib.suppress(OSError):
                    self._file.close()

    def close(self) -> None:
        with self._lock:
            self._file.close()


@contextlib.contextmanager
def open_trace(path: str) -> Iterator[Trace]:
    """A trace into a file, or one that writes nothing if ``path`` is empty.

    Raises:
        ConfigError: if the file cannot be written.
    """
    if not path:
        yield Trace()
        return
    try:
        trace = TraceFile(Path(path).expanduser())
    except OSError as exc:
        raise ConfigError("trace_path", f"cannot write {path}: {exc.strerror or exc}") from exc
    try:
        yield trace
    finally:
        trace.close()
