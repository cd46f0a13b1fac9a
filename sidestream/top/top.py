"""``sidestream top``, running: asks its source on one thread, draws and takes keys on another."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from typing import Final

from rich.console import Console, RenderableType
from rich.live import Live

from sidestream.contract.errors import SidestreamError
from sidestream.top.screen import SORTS, screen
from sidestream.top.source import Picture, PictureSource

_LOOK_EVERY_S: Final = 2.0
_DRAW_EVERY_S: Final = 0.5
_PAGE: Final = 10
_QUIT: Final = ("q", "Q", "\x1b", "\x03")
_SCROLL: Final = {"\x1b[A": -1, "\x1b[B": 1, "k": -1, "j": 1, "\x1b[5~": -_PAGE, "\x1b[6~": _PAGE, " ": _PAGE}


class Top:
    """A screen that follows a source until somebody leaves it.

    Args:
        source: Where to look.
        stop: Set by a signal.
        console: Where to draw.
    """

    def __init__(self, source: PictureSource, stop: threading.Event, console: Console) -> None:
        self._source = source
        self._stop = stop
        self._console = console
        self._picture = Picture()
        self._lock = threading.Lock()
        self._notice = ""
        self._sort = self._skip = 0

    def once(self) -> Picture:
        """Look once.

        Raises:
            SidestreamError: if nothing can be seen.
        """
        self._picture.take(self._source.look())
        return self._picture

    def run(self) -> None:
        """Draw until q, Ctrl-C or ``stop``.

        Raises:
            SidestreamError: if nothing can be seen at first; later on that is shown, and tried again.
        """
        self.once()
        looker = threading.Thread(target=self._follow, name="top", daemon=True)
        looker.start()
        with _keys() as keys, Live(console=self._console, screen=True, auto_refresh=False) as live:
            while not self._stop.is_set():
                # Drawn at the size that the terminal has now: a new one needs no signal.
                live.update(self._draw(), refresh=True)
                key = keys(_DRAW_EVERY_S)
                if key in _QUIT:
                    break
                self._press(key)
        self._stop.set()
        looker.join(1.0)

    def _follow(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            try:
                view = self._source.look()
            except SidestreamError as exc:
                self._notice = f"{time.strftime('%H:%M:%S')} {exc}"
                continue
            with self._lock:
                self._picture.take(view)
            self._notice = ""

    def _press(self, key: str) -> None:
        if key == "s":
            self._sort, self._skip = (self._sort + 1) % len(SORTS), 0
        most = max(0, len(self._picture.devices) - 1)
        self._skip = min(most, max(0, self._skip + _SCROLL.get(key, 0)))

    def _draw(self) -> RenderableType:
        with self._lock:
            width, height = self._console.size
            return screen(
                self._picture,
                width=width,
                height=height,
                sort=self._sort,
                skip=self._skip,
                notice=self._notice,
            )


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits for a key so long and returns it, empty if none came."""
    file = sys.stdin.fileno()
    if not os.isatty(file):
        yield _no_key
        return
    before = termios.tcgetattr(file)

    def key(timeout_s: float) -> str:
        ready, _, _ = select.select([file], [], [], timeout_s)
        return os.read(file, 16).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(file)
        yield key
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def _no_key(timeout_s: float) -> str:
    time.sleep(timeout_s)
    return ""
