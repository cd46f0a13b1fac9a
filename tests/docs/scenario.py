"""Follows a page: every machine is a folder, every address is this machine, every port a free one."""

from __future__ import annotations

import csv
import importlib.resources
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.docs.markdown import Step
from tests.until import until

_ADDRESS = re.compile(r"\b192\.168\.\d+\.\d+\b|\b0\.0\.0\.0\b")
_PORTS = ("1883", "8883", "9464", "9465")
_COMMAND_S = 180.0
_SAMPLES = 240


class Scenario:
    """Does the steps of one page.

    Args:
        folder: Below which the machines' folders lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = {port: str(_free_port()) for port in _PORTS}
        self._machine = "here"
        self._background: list[tuple[str, subprocess.Popen[bytes], Path]] = []

    def do(self, step: Step) -> None:
        """Do one step.

        Raises:
            AssertionError: it did not do what the page says.
        """
        getattr(self, f"_do_{step.kind}")(step)
        self._check_background(step)

    def close(self) -> None:
        """End what still runs, the last one first."""
        for _, process, _ in reversed(self._background):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    # --- steps ---------------------------------------------------------------------------------------

    def _do_machine(self, step: Step) -> None:
        self._machine = step.words[0]

    def _do_skip(self, step: Step) -> None:
        assert step.words[0].strip(), f"line {step.line}: say why it is not run"

    def _do_file(self, step: Step) -> None:
        path = self._home / step.words[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = self._here(step.text)
        if path.name == "trainer.toml":  # other pages are followed at the same time
            given = {"metrics_port": self._ports["9464"], "page_port": self._ports["9465"]}
            text = "".join(f"{name} = {port}\n" for name, port in given.items() if name not in text) + text
        path.write_text(text, encoding="utf-8")

    def _do_data(self, step: Step) -> None:
        lines = (
            importlib.resources.files("sidestream").joinpath("data/commands_train.jsonl").read_text("utf-8")
        )
        rows = [json.loads(line) for line in lines.splitlines()[:_SAMPLES]]
        with (self._home / step.words[0]).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def _do_copy(self, step: Step) -> None:
        machine, path = step.words
        shutil.copy(self._folder / machine / path, self._home / Path(path).name)

    def _do_reload(self, step: Step) -> None:
        next(one for one in self._background if one[0].startswith(step.words[0]))[1].send_signal(
            signal.SIGHUP
        )

    def _do_console(self, step: Step) -> None:
        for command in step.commands():
            self._run(["bash", "-euc", self._here(command)], step, code=0)

    def _do_fails(self, step: Step) -> None:
        for command in step.commands():
            self._run(["bash", "-euc", self._here(command)], step, code=int(step.words[0]))

    def _do_python(self, step: Step) -> None:
        self._run([sys.executable, "-c", self._here(step.text)], step, code=0)

    def _do_background(self, step: Step) -> None:
        for command in step.commands():
            log = self._folder / f"background-{len(self._background)}.log"
            with log.open("wb") as out:
                process = subprocess.Popen(
                    ["bash", "-euc", f"exec {self._here(command)}"],
                    cwd=self._home,
                    env=self._environment,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            self._background.append((command, process, log))
            self._await(process, log, step.words[0], step)

    def _do_wait(self, step: Step) -> None:
        begins, text = step.words
        _, process, log = next(one for one in self._background if one[0].startswith(begins))
        self._await(process, log, text, step)

    # --- means ---------------------------------------------------------------------------------------

    @property
    def _home(self) -> Path:
        home = self._folder / self._machine
        home.mkdir(exist_ok=True)
        return home

    @property
    def _environment(self) -> dict[str, str]:
        """A login's on that machine: this Python's programs, and nothing of ours."""
        kept = {name: os.environ[name] for name in ("LANG", "PYTHONPATH") if name in os.environ}
        programs = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return {**kept, "PATH": programs, "HOME": str(self._home), "HF_HUB_OFFLINE": "1"}

    def _here(self, text: str) -> str:
        text = _ADDRESS.sub("127.0.0.1", text)
        for port, free in self._ports.items():
            text = re.sub(rf"(?<!\d){port}(?!\d)", free, text)
        return text

    def _run(self, command: list[str], step: Step, *, code: int) -> None:
        done = subprocess.run(
            command,
            cwd=self._home,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, f"line {step.line}: {command[-1]}: exit {done.returncode}\n{said}"
        assert "Traceback" not in said, f"line {step.line}: {said}"

    def _await(self, process: subprocess.Popen[bytes], log: Path, text: str, step: Step) -> None:
        def came() -> bool:
            said = log.read_text(errors="replace")
            assert text in said or process.poll() is None, f"line {step.line}: ended\n{said}"
            return text in said

        until(came, f"line {step.line}: {text!r}; see {log}", _COMMAND_S, every_s=0.1)

    def _check_background(self, step: Step) -> None:
        for command, process, log in self._background:
            ended = process.poll()
            said = log.read_text(errors="replace")
            assert ended in (None, 0), f"line {step.line}: {command} ended with {ended}\n{said[-3000:]}"
            assert "Traceback" not in said, f"{command}: {said[-3000:]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
