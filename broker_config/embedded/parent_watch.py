"""Run one command and never let it outlive our parent.

``python -m broker_config.embedded.parent_watch COMMAND…``

The watch ends its command when its standard input closes or its parent changes, either of which happens
when the parent dies, by ``kill -9`` too. The kernel's parent-death signal alone would not do for the parent
itself: it is tied to the *thread* that started the child, and fires when that thread ends. The watch has
but one thread, so for its own command it is used, in case the watch is what gets killed.

Prints ``pid N`` of the command on its standard output, and exits as the command did.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

_POLL_S = 0.25
_GRACE_S = 5.0
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run ``command`` until it ends, we are told to end it, or the parent is gone."""
    parent = os.getppid()
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: told.append(received))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    print(f"pid {child.pid}", flush=True)
    while child.poll() is None and not told and os.getppid() == parent and not _stdin_closed(_POLL_S):
        continue
    return _end(child)


def _end(child: subprocess.Popen[bytes]) -> int:
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
    if child.poll() is None:
        child.kill()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _stdin_closed(timeout_s: float) -> bool:
    ready, _, _ = select.select([sys.stdin.fileno()], [], [], timeout_s)
    return bool(ready) and not os.read(sys.stdin.fileno(), 4096)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
