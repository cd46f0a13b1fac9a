"""``python -m MODULE …`` without the seconds that importing torch and transformers takes.

Processes are forked from a server that has imported them and done nothing else. Each has its own memory,
files, signals and end, and runs the module as the command line does. That a module also starts from nothing
is seen where the pages of the documentation are followed, in tests/docs.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

_IMPORTED: Final = (
    *(
        "edge_agent.session.agent",
        "sidestream.backbone.torch_runtime.runtime",
        "edge_agent.answers.predictor",
        "edge_agent.commands.agent",
    ),
    *(
        "side_trainer.trainer",
        "side_trainer.operator.audit",
        "side_trainer.operator.commands",
        "sidestream.demo.crew",
    ),
    *("transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert"),
    *("transformers.models.llama.modeling_llama", "torch._dynamo"),
    "tests.forked",
)
_SERVER: Final = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(list(_IMPORTED))


class Process(Protocol):
    """What :class:`Forked` and :class:`subprocess.Popen` have in common."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> Any: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None, /) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Forked:
    """A process that runs a module.

    Args:
        module: To run as ``__main__``.
        arguments: Of its command line.
        out: Where standard output and standard error are appended.
        cwd: Its working directory.
        env: Environment variables beside ours.
    """

    def __init__(
        self, module: str, *arguments: str, out: Path, cwd: Path, env: Mapping[str, str] | None = None
    ) -> None:
        out.touch()  # whoever looks for it need not wait
        environment = {**os.environ, **(env or {})}
        self._process = _SERVER.Process(
            target=_become, args=(module, arguments, out.absolute(), cwd, environment)
        )
        self._process.start()
        assert self._process.pid is not None
        self._pid = self._process.pid

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, the negative number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it has not come.
        """
        self._process.join(timeout_s)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout_s or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self._pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(
    module: str, arguments: tuple[str, ...], out: Path, cwd: Path, environment: Mapping[str, str]
) -> None:
    said = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(said, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
