"""``python -m tests.e2e.arm64 ROOT``: an agent in the root of an ARM system does a job, for scripts/arm64."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from broker_config.embedded.broker import EmbeddedBroker
from tests.agent.exported import exported
from tests.e2e.processes import LABELS, Processes

_SAMPLES = 40
_PATIENCE_S = 600.0
_COMMAND = ("-m", "sidestream.cli")
_VERSIONS = """\
import platform, sys
from importlib.metadata import distributions
names = sorted(f"{one.name} {one.version}" for one in distributions())
print(platform.machine(), "Python", platform.python_version(), *platform.libc_ver(), len(names), "packages")
print(*names, sep=", ")
absent = [name for name in ("torch", "transformers") if not __import__("importlib.util").util.find_spec(name)]
print("not there:", *absent)
"""


def main() -> int:
    root = Path(sys.argv[1])
    print(_inside(root, "-c", _VERSIONS), end="")
    with tempfile.TemporaryDirectory(dir=root, prefix="job-") as name:
        folder = Path(name)
        with EmbeddedBroker(data_dir=folder / "broker", kind="auto") as broker:
            fleet = Processes(folder, broker.url)
            try:
                _job(root, fleet)
            finally:
                fleet.close()
    return 0


def _job(root: Path, fleet: Processes) -> None:
    folder = exported(fleet.backbone, fleet.folder / "exported", "int8")
    data, state = fleet.write_data("arm", _SAMPLES), fleet.folder / "arm"
    fleet.trainer()
    started = time.monotonic()
    print(
        _inside(
            root,
            *(*_COMMAND, "agent", "run", "--job", fleet.job, "--device", "arm", "--tier", "small"),
            *("--broker", fleet.url, "--state-dir", _path(state, root), "--exit-when-done", "--threads", "1"),
            *("--backbone", _path(folder, root), "--data", _path(data, root), "--held-out-share", "0"),
        ),
        end="",
    )
    print(f"agent: {time.monotonic() - started:.0f} s; {fleet.journaled()} of {_SAMPLES} samples journaled")
    assert fleet.journaled() == _SAMPLES
    texts = ("warm heat cold up", "lights switch on", "down off please")
    said = _inside(
        *(root, *_COMMAND, "agent", "predict", "--state-dir", _path(state, root), "--json"),
        *texts,
    )
    print(said, end="")
    answers = [
        json.loads(line) for line in said.splitlines() if line.startswith("{")
    ]  # onnxruntime warns too
    assert [answer["label"] for answer in answers] == list(LABELS), said


def _path(path: Path, root: Path) -> str:
    """As it is called within the root."""
    return f"/{path.relative_to(root)}"


def _inside(root: Path, *command: str) -> str:
    """What Python in the root says, errors and log included."""
    done = subprocess.run(
        ["chroot", str(root), "/usr/bin/env", "PYTHONPATH=/agent", "python3", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_PATIENCE_S,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}: exit {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
