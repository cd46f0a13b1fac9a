"""The demo's child processes: each with a log of its own, with a watch on its parent, and ended in order."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Final

from sidestream.contract.errors import SidestreamError
from sidestream.host.state_dir import private

_STOP_S: Final = 20.0
_INTERRUPTED: Final = 130
_LOG_TAIL_LINES: Final = 3


class Children:
    """Starts modules as processes; closing it stops them all.

    Args:
        folder: Where their logs go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *module: str) -> None:
        """Run ``python -m MODULE…``; its output goes to ``<name>.log``."""
        with open(self._log_file(name), "wb", opener=private) as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "sidestream.demo.parent_watch", *module],
                stdin=subprocess.PIPE,  # closes when we end, however we end: see sidestream.demo.parent_watch
                stdout=log,
                stderr=log,
                start_new_session=True,
                umask=0o077,  # what they write is as private as the folder
            )

    def said(self, name: str, start: str) -> str | None:
        """What follows ``start`` in the first line of a child's log that begins with it; None until then."""
        text = self._log_file(name).read_text(errors="replace")
        found = (line.removeprefix(start) for line in text.splitlines() if line.startswith(start))
        return next(found, None)

    def check(self, *, may_end: Collection[str] = ()) -> None:
        """See that all is well.

        Raises:
            SidestreamError: if a child failed, or one that is not in ``may_end`` has ended.
        """
        for name, process in self._running.items():
            code = process.poll()
            if code == _INTERRUPTED:
                raise KeyboardInterrupt
            if code is not None and (code or name not in may_end):
                raise self._failed(name)

    def ended(self, name: str) -> bool:
        return self._running[name].poll() is not None

    def peak_rss_bytes(self, name: str) -> int:
        """Of a running child; 0 where the system does not tell."""
        try:
            status = Path(f"/proc/{self._running[name].pid}/status").read_text()
        except OSError:
            return 0
        kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), "0")
        return int(kib) * 1024

    def close(self) -> None:
        """SIGTERM to all, wait, and only then harder means. Idempotent."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self._running.clear()

    def _log_file(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _failed(self, name: str) -> SidestreamError:
        lines = self._log_file(name).read_text(errors="replace").strip().splitlines()
        told = " | ".join(lines[-_LOG_TAIL_LINES:]) or "it said nothing"
        return SidestreamError(f"{name} ended too early: {told.removeprefix('sidestream: error: ')}")
