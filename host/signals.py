"""Signals as events: handlers set a flag and do nothing else."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def stop_event() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; the handlers before are put back on leaving.

    A second Ctrl-C interrupts at once, for whoever will not wait for the orderly end.
    """
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

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
