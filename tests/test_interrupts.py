"""Ctrl-C ends every program at once and without a traceback, however early it comes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_INTERRUPT_AT_IMPORT = """
import os, signal, sys
def on_event(event, arguments):
    if event == "import" and arguments[0] == os.environ["INTERRUPT_AT"]:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(on_event)
"""
_INTERRUPT_WHERE_NOTHING_CAN_BE_RAISED = """
import os, signal, sidestream.cli
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
def build_parser(command):
    global late
    late = Late()
    late = None
sidestream.cli.build_parser = build_parser
from sidestream.start import main
main()
"""
_PROGRAMS = [
    ".".join(path.relative_to(_ROOT).with_suffix("").parts)
    for room in ("benchmarks", "sidestream", "metrics", "broker_config")
    for path in sorted((_ROOT / room).rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
    and path.stem not in ("parent_watch", "poll", "probe", "help_page")
]


def _interrupted(command: list[str], at: str, folder: Path) -> tuple[int, str]:
    """Run a command that gets SIGINT when it imports ``at``; its exit code, and what it said of it."""
    (folder / "sitecustomize.py").write_text(_INTERRUPT_AT_IMPORT)
    environ = {**os.environ, "PYTHONPATH": f"{folder}:{_ROOT}", "INTERRUPT_AT": at}
    ended = subprocess.run(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    return ended.returncode, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("at", ["argparse", "numpy", "paho.mqtt.client", "torch", "torch._C"])
@pytest.mark.parametrize("way", ["script", "module"])
def test_a_command_interrupted_while_it_starts_says_nothing(way: str, at: str, tmp_path: Path) -> None:
    script = [str(Path(sys.executable).with_name("sidestream"))]
    started = script if way == "script" else [sys.executable, "-m", "sidestream.cli"]
    assert _interrupted([*started, "demo", "--keep", str(tmp_path / "kept")], at, tmp_path) == (130, "")


@pytest.mark.slow
@pytest.mark.parametrize("program", _PROGRAMS)
def test_so_does_every_program(program: str, tmp_path: Path) -> None:
    assert _interrupted([sys.executable, "-m", program, "--help"], "msgspec", tmp_path) == (130, "")


@pytest.mark.slow
def test_an_interrupt_where_nothing_can_be_raised_ends_it_too() -> None:
    command = [sys.executable, "-c", _INTERRUPT_WHERE_NOTHING_CAN_BE_RAISED]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "")
