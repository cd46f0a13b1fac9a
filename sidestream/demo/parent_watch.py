"""Run a module that ends with us: ``python -m sidestream.demo.parent_watch MODULE ARGUMENTS…``.

The parent holds the other end of standard input. When that closes, however the parent ended, this process
gets SIGTERM and goes through its orderly shutdown.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _await_end(descriptor: int) -> None:
    while os.read(descriptor, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Keep an eye on standard input, and become the module."""
    parent = os.dup(0)
    with open(os.devnull) as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_await_end, args=(parent,), daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
