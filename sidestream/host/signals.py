"""Signals: as events, for whom a flag is enough, and Ctrl-C in a program that has no time for it yet.

Imports next to nothing: a program asks for :func:`heed_interrupts` before it imports what takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED: Final = 130
"""The exit code after Ctrl-C: 128 and the signal's number, as shells have it."""


def heed_interrupts() -> None:
    """Have Ctrl-C end this process with exit code 130 and without a traceback, from now to its very end.

    Amid an import the process ends there and then: nothing has begun that would want an orderly end, and an
    exception raised inside other people's modules comes out as any other, or not at all. Otherwise it is a
    KeyboardInterrupt, as ever.
    """
    signal.signal(signal.SIGINT, _on_interrupt)
    sys.excepthook = _uncaught
    sys.unraisablehook = _unraisable


def heed_interrupts_of_module() -> None:
    """The same, if called while ``python -m`` is on its way to a module; for the ``__init__`` of a package.

    Until it has found the module, Python has ``-m`` in place of the program's name. What the module imports
    comes after that.
    """
    if sys.argv[0] == "-m":
        heed_interrupts()


def _on_interrupt(_number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    sys.__excepthook__(kind, error, trace)


def _unraisable(lost: UnraisableHookArgs) -> None:
    """Where an exception cannot be raised, as in a destructor or while Python ends, Ctrl-C would be lost."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    sys.__unraisablehook__(lost)


@contextlib.contextmanager
def stop_event() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; the handlers before are put back on leaving.

    A second Ctrl-C interrupts at once, for whoever will not wait for the orderly end.
    """
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, _on_interrupt)

    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def set_on_hangup(event: threading.Event) -> Iterator[None]:
    """Have SIGHUP set ``event``; the handler before is put back on leaving."""
    before = signal.signal(signal.SIGHUP, lambda _number, _frame: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
