"""Starts processes without their imports: one process has imported everything, and forks.

    python -m benchmarks.fault_starter

What it forks is a process of its own, with its own pid and files, which dies alone when it is killed. Fifty
rounds of a fault would else spend most of their time importing torch and transformers.

One request a line on standard input, what became of it a line on standard output, both JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_IMPORTED: Final = (
    *("sidestream.cli", "edge_agent.agent", "edge_agent.backbone", "side_trainer.trainer"),
    *(
        "torch._dynamo",
        "transformers.models.bert.modeling_bert",
        "transformers.models.bert.tokenization_bert",
    ),
)
_LOOK_S: Final = 0.02
_PATIENCE_S: Final = 120.0
_ROOT: Final = Path(__file__).resolve().parents[1]


class Started:
    """A process that was started: what of :class:`subprocess.Popen` is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """As Popen has it: negative for a signal. None while it runs."""
        self._ended = threading.Event()

    def poll(self) -> int | None:
        """The exit status, if it has ended."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def end(self, status: int) -> None:
        """It has ended."""
        self.returncode = status
        self._ended.set()


class Starter:
    """Has the process that forks. A context manager.

    Args:
        env: Beside ours, what is set in all processes.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fault_starter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={**os.environ, **env},
        )
        self._started: dict[int, Started] = {}
        self._new: queue.Queue[Started] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self, module: str, arguments: list[str], *, log: Path, env: Mapping[str, str]) -> Started:
        """Run ``module``'s ``main`` with these arguments; what it says is added to ``log``."""
        assert self._process.stdin is not None
        request = {"module": module, "arguments": arguments, "log": str(log), "env": dict(env)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._new.get(timeout=_PATIENCE_S)

    def close(self) -> None:
        """End it; what it started is somebody else's to end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(_PATIENCE_S)
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "started" in told:
                self._started[told["started"]] = started = Started(told["started"])
                self._new.put(started)
            else:
                self._started.pop(told["ended"]).end(told["status"])


def main() -> int:
    """Import, then fork on request, until standard input ends and nothing that was forked is left."""
    for module in _IMPORTED:
        importlib.import_module(module)
    running, buffer, open_ = 0, b"", True
    while open_ or running:
        if open_ and select.select([0], [], [], _LOOK_S)[0]:
            data = os.read(0, 65536)
            open_, (*lines, buffer) = bool(data), (buffer + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if not pid:
                    return _run(json.loads(line))
                running += 1
                _tell(started=pid)
        elif not open_:
            time.sleep(_LOOK_S)
        running -= _reap()
    return 0


def _reap() -> int:
    """Tell of all that have ended, and return how many."""
    ended = 0
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            _tell(ended=found[0], status=os.waitstatus_to_exitcode(found[1]))
            ended += 1
    return ended


def _tell(**told: int) -> None:
    os.write(1, json.dumps(told).encode() + b"\n")


def _run(request: dict[str, Any]) -> int:
    """In the new process: become what was asked for."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    os.environ.update(request["env"])
    sys.argv = [request["module"], *request["arguments"]]
    code: int = importlib.import_module(request["module"]).main(request["arguments"])
    return code


if __name__ == "__main__":
    sys.exit(main())
