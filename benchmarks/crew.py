"""What agents take that run in one process: threads, memory, open files, processor and wall time.

    python benchmarks/crew.py --agents 1 --samples 400 --backbone minilm-int8
    python benchmarks/crew.py --agents 500 --samples 16

A real trainer, Mosquitto, and one process: ``sidestream agent run`` for one agent, the demo's crew for more.
Each agent sends its own samples, adopts the final weights, measures them and ends. Figures are read from
``/proc``: Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.program import Tell, run_program, teller
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render
from broker_config.connection.connection import Connection
from broker_config.embedded.broker import EmbeddedBroker
from broker_config.settings import BrokerSettings
from broker_config.transport import Event, Received
from side_trainer.operator.status import read_state
from sidestream.backbone.onnx_runtime.folder import read
from sidestream.contract.errors import SidestreamError
from sidestream.contract.topics import Topics
from tests.agent.exported import exported
from tests.agent.tiny import save_tiny
from tests.e2e.processes import LABELS, WORDS

_ROOT: Final = Path(__file__).resolve().parents[1]
_JOB: Final = "crew"
_BATCH: Final = 16
_LOOK_S: Final = 0.1
_TELL_S: Final = 10.0
_START_S: Final = 120.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_MIB: Final = 2**20


@dataclasses.dataclass
class Figures:
    """Of the agents' process."""

    agents: int
    samples: int
    """Of all of them."""
    journaled: int = 0
    """Samples that the trainer had in its journal at the end."""
    first_batch_s: float = 0.0
    """From its start to the first batch at the broker."""
    first_batch_cpu_s: float = 0.0
    """Its processor time until then."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    threads: int = 0
    """The most at once; likewise of the next two."""
    rss_bytes: int = 0
    files: int = 0

    @property
    def cpu_ms_a_sample(self) -> float:
        """Processor time from the first batch on, for each sample after it."""
        later = max(1, self.samples - _BATCH)
        return 1e3 * (self.cpu_s - self.first_batch_cpu_s) / later


class _Onlooker:
    """Notes when the first batch comes to the broker, and that there is a plan."""

    def __init__(self, url: str) -> None:
        self.came_s: float | None = None
        self.plan = threading.Event()
        self._subscribed = Connection(BrokerSettings(url=url), client_id="sidestream-crew-onlooker")
        for topic in (Topics(_JOB).plan, Topics(_JOB).uplink_filter("activations")):
            self._subscribed.subscribe(topic)
        self._subscribed.start(self._hear)
        if not self._subscribed.wait_connected(20.0):
            raise SidestreamError("the broker does not answer")

    def _hear(self, event: Event) -> None:
        if isinstance(event, Received) and event.topic == Topics(_JOB).plan:
            self.plan.set()
        elif isinstance(event, Received) and self.came_s is None:
            self.came_s = time.monotonic()

    def close(self) -> None:
        self._subscribed.close()


def measure(folder: Path, *, agents: int, samples: int, backbone: str, tell: Tell) -> Figures:
    """Run a job to its end.

    Args:
        folder: Empty, for everything.
        agents: How many, in one process.
        samples: Of each.
        backbone: A folder that ``sidestream backbone export`` wrote; empty for a tiny random model's.
        tell: Given lines of progress.

    Raises:
        SidestreamError: a process failed; the message has its last lines.
    """
    exported_at, model = _backbone(folder, backbone)
    with EmbeddedBroker(data_dir=folder / "broker", kind="mosquitto") as broker:
        broker.wait_ready()
        onlooker = _Onlooker(broker.url)
        try:
            with _trainer(folder, broker.url, model):
                paths = [
                    _agent(folder, f"dev-{number:04d}", broker.url, exported_at, samples)
                    for number in range(agents)
                ]
                if not onlooker.plan.wait(_START_S):
                    raise SidestreamError(f"the trainer published no plan in {_START_S:.0f} s")
                return _run(folder, paths, onlooker, Figures(agents, agents * samples), tell)
        finally:
            onlooker.close()


def _backbone(folder: Path, given: str) -> tuple[Path, str]:
    """The exported folder, and what the plan calls its model."""
    if given:
        return Path(given).resolve(), read(Path(given)).model
    model = save_tiny(folder / "model", "bert")
    return exported(model, folder / "exported", "int8"), str(model)


@contextmanager
def _trainer(folder: Path, url: str, model: str) -> Iterator[None]:
    config = folder / "trainer.toml"
    config.write_text(
        f'job = "{_JOB}"\nstate_dir = "{folder / "trainer"}"\nlabels = {json.dumps(LABELS)}\n'
        f'metrics_port = -1\npage = false\n[broker]\nurl = "{url}"\n'
        f'[tiers.small]\nbackbone = "{model}"\nbatch_size = {_BATCH}\n'
    )
    process = _start(folder, "trainer", "sidestream.cli", "trainer", "run", str(config))
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _agent(folder: Path, name: str, url: str, backbone: Path, samples: int) -> Path:
    """An agent's settings and data."""
    data, config, rng = folder / f"{name}.jsonl", folder / f"{name}.toml", random.Random(name)
    with data.open("w") as file:
        for number in range(samples):
            label = rng.choice(LABELS)
            words = [*rng.choices(WORDS[label], k=rng.randint(8, 16)), *rng.choices(("the", "a", "now"), k=8)]
            file.write(json.dumps({"text": " ".join(words), "label": label, "row": number}) + "\n")
    config.write_text(
        f'job = "{_JOB}"\ndevice = "{name}"\ntier = "small"\nstate_dir = "{folder / name}"\nthreads = 1\n'
        f'backbone = "{backbone}"\nexit_when_done = true\nbroker_wait_s = 0\n[broker]\nurl = "{url}"\n'
        f'[data]\npath = "{data}"\nheld_out_share = 0.0\n'
        f'evaluation_path = "{data}"\nevaluation_max_samples = {2 * _BATCH}\n'
    )
    return config


def _start(folder: Path, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdout=log, stderr=log, cwd=_ROOT, env=environment
        )


def _run(folder: Path, paths: Sequence[Path], onlooker: _Onlooker, figures: Figures, tell: Tell) -> Figures:
    command: tuple[str, ...] = ("sidestream.cli", "agent", "run", str(paths[0]))
    if len(paths) > 1:
        command = ("sidestream.demo.crew", *map(str, paths))
    started = told_s = time.monotonic()
    process = _start(folder, "agents", *command)
    stop = threading.Event()
    try:
        while process.poll() is None:
            _look(process.pid, figures)
            if onlooker.came_s is not None and not figures.first_batch_s:
                figures.first_batch_s, figures.first_batch_cpu_s = onlooker.came_s - started, figures.cpu_s
            if time.monotonic() - told_s > _TELL_S:
                told_s = time.monotonic()
                tell(f"{figures.threads} threads, {figures.rss_bytes / _MIB:.0f} MiB, {figures.files} files")
            stop.wait(_LOOK_S)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    figures.wall_s = time.monotonic() - started
    if process.returncode:
        lines = (folder / "agents.log").read_text(errors="replace").strip().splitlines()
        raise SidestreamError(f"the agents ended with {process.returncode}: {' | '.join(lines[-3:])}")
    figures.journaled = read_state(folder / "trainer").samples
    return figures


def _look(pid: int, figures: Figures) -> None:
    """Take what the process is and has by now."""
    home = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (home / "status").read_text().splitlines())
        times = (home / "stat").read_text().rpartition(")")[2].split()
        files = len(list((home / "fd").iterdir()))
    except OSError:
        return
    if "VmRSS" not in status:  # it has just ended
        return
    figures.threads = max(figures.threads, int(status["Threads"]))
    figures.rss_bytes = max(figures.rss_bytes, 1024 * int(status["VmRSS"].split()[0]))
    figures.files = max(figures.files, files)
    figures.cpu_s = (int(times[11]) + int(times[12])) / _TICKS


def table(figures: Figures) -> str:
    """The figures, one a line."""
    rows = (
        ("agents, samples each", f"{figures.agents}, {figures.samples // figures.agents}"),
        ("samples journaled", f"{figures.journaled} of {figures.samples}"),
        ("start to the first batch at the broker", f"{figures.first_batch_s:.2f} s"),
        ("processor time until then", f"{figures.first_batch_cpu_s:.2f} s"),
        ("wall time in all", f"{figures.wall_s:.1f} s"),
        ("processor time in all", f"{figures.cpu_s:.1f} s"),
        ("processor time a sample, after the first batch", f"{figures.cpu_ms_a_sample:.2f} ms"),
        ("threads, at most", str(figures.threads)),
        ("resident memory, at most", f"{figures.rss_bytes / 1e6:.0f} MB"),
        ("open files, at most", str(figures.files)),
    )
    return render(("the agents' process", "measured"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _measured, arguments)


def _measured(args: argparse.Namespace) -> str:
    about = about_this_run()
    with tempfile.TemporaryDirectory(prefix="sidestream-crew-") as name:
        folder = Path(args.keep or name)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(
            folder, agents=args.agents, samples=args.samples, backbone=args.backbone, tell=teller()
        )
    if args.json:
        write_json(args.json, about, {"crew": dataclasses.asdict(found)})
    return table(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="crew", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--agents", type=int, default=32, help="in one process (default: 32)")
    parser.add_argument("--samples", type=int, default=64, help="of each agent (default: 64)")
    parser.add_argument("--backbone", default="", help="an exported folder; default: a tiny random model's")
    parser.add_argument("--keep", default="", metavar="DIR", help="work there, and leave logs and states")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
