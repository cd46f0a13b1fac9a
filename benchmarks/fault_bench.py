"""The stage for faults: a trainer, agents and a broker as real processes, and an account of every sample.

Each sample of a device has a label of its own, so that what the journal holds is compared with what was fed
sample by sample, by content and not by the product's own counters.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from benchmarks.fault_points import NOTE
from broker_config.embedded.broker import EmbeddedBroker
from side_trainer.journal.journal import FILE_NAME, Journal
from sidestream.contract.errors import SidestreamError
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.wire import unpack
from tests.agent.tiny import WORDS
from tests.e2e.processes import Processes
from tests.forked import Process
from tests.until import until

MOST_SAMPLES: Final = 1000
"""Samples a device: as many as there are labels."""
_LABELS: Final = tuple(f"row{index:04d}" for index in range(MOST_SAMPLES))
_WAIT_S: Final = 240.0
_FOLD_S: Final = 900.0  # of fifty rounds, on a busy machine
_PAGE: Final = 4096


@dataclass(kw_only=True)
class Outcome:
    """A row of the table."""

    row: str
    """The fault."""
    seed: int
    """Of its moments."""
    rounds: int = 0
    """How often it struck."""
    samples: int = 0
    """Fed to the devices."""
    lost: int = 0
    """Of those, in no journal record, and not reported as dropped by their device either."""
    twice: int = 0
    """Journaled more than once."""
    verified: bool = False
    """Whether a re-fold gives the weights of the checkpoint."""
    wall_s: float = 0.0
    """What the row took."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else was seen."""

    @property
    def good(self) -> bool:
        """Whether the promise held."""
        return self.lost == 0 and self.twice == 0 and self.verified


class Bench(Processes):
    """One row's fleet. A context manager.

    Args:
        folder: Empty, for everything.
        seed: Of the moments at which things happen.
        tell: Given a line of progress.
        fresh: Start every process from nothing; forked ones, which are quicker, have the imports of all.
    """

    def __init__(self, folder: Path, seed: int, tell: Callable[[str], None], *, fresh: bool = False) -> None:
        self.broker = EmbeddedBroker(data_dir=folder / "broker", kind="mosquitto")
        self.broker.start()
        self.broker.wait_ready()
        super().__init__(folder, self.broker.url, job="faults")
        self._fresh = fresh
        self.rng = random.Random(seed)
        self.tell = tell
        self.fed: Counter[str] = Counter()
        self.dropped = 0
        """Samples that devices said they dropped."""
        self.notes: dict[str, Any] = {}
        self.settings: dict[str, str] = {}
        """More lines of trainer.toml, by what stands before the ``=``."""
        self.agent_settings: dict[str, str] = {}
        self.retry_s = 1.0
        """After how long devices send again, and the trainer connects anew where nothing moves."""
        self.labels: tuple[str, ...] = _LABELS
        """The job's."""
        self.protocol = "auto"
        """MQTT version of the agents."""
        self.tier_settings: dict[str, str] = {"batch_size": "4"}
        self.learner_settings: dict[str, str] = {"passes": "1"}
        self.side_network: dict[str, str] = {"width": "16", "inner": "16"}
        self.names: dict[str, str] = {}
        """Devices whose name in the fleet is not that of their files."""
        self.first: Counter[str] = Counter()
        """The first label of a device, if not 0."""
        self._read: dict[str, int] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self.broker.stop()

    # --- processes -----------------------------------------------------------------------------------

    def trainer(self, *flags: str, point: str = "", clock: Path | None = None) -> Process:
        config = self.folder / "trainer.toml"
        lines = {
            "job": json.dumps(self.job),
            "state_dir": json.dumps(str(self.trainer_state)),
            "labels": json.dumps(self.labels),
            "metrics_port": "-1",
            "page": "false",
            "checkpoint_every_s": "0.5",
            "idle_after_s": "0.3",
            "publish_every_s": "0.2",
            **self.settings,
        }
        config.write_text(
            _lines(lines)
            + f'[broker]\nurl = "{self.url}"\nkeepalive_s = 5\n[learner]\n'
            + _lines(self.learner_settings)
            + f"[side_network]\n{_lines(self.side_network)}[flow]\nretry_s = {self.retry_s}\n"
            + f'[tiers.small]\nbackbone = "{self.backbone}"\nlayers = 2\n'
            + _lines(self.tier_settings)
        )
        return self._start_at(point, "trainer", "trainer", "run", str(config), *flags, clock=clock)

    def device(
        self, name: str, *, point: str = "", clock: Path | None = None, url: str = "", state: str = ""
    ) -> Process:
        """An agent that follows a file of its own; :meth:`feed` appends to it."""
        config, data = self.folder / f"{name}.toml", self.folder / f"{name}.jsonl"
        data.touch()
        more = _lines(self.agent_settings)
        config.write_text(
            f'job = "{self.job}"\ndevice = "{self.names.get(name, name)}"\ntier = "small"\nthreads = 1\n'
            f'telemetry_every_s = 0.5\nstate_dir = "{state or self.folder / name}"\nbroker_wait_s = 0\n{more}'
            f'[broker]\nurl = "{url or self.url}"\nkeepalive_s = 5\nprotocol = "{self.protocol}"\n'
            f'[data]\npath = "{data}"\nwatch = true\npoll_s = 0.05\nheld_out_share = 0.0\n'
        )
        return self._start_at(point, name, "agent", "run", str(config), clock=clock)

    def _start_at(self, point: str, name: str, *arguments: str, clock: Path | None) -> Process:
        env = {"OMP_NUM_THREADS": "1", NOTE: str(self.folder / f"{name}.note")}
        if point:
            return self.start(name, point, *arguments, module="benchmarks.fault_points", env=env)
        if clock:
            by_its_clock = "benchmarks.fault_clock"  # before anything is imported that may keep a clock
            return self.start(name, str(clock), *arguments, module=by_its_clock, env=env, fresh=True)
        return self.start(name, *arguments, env=env, fresh=self._fresh)

    def feed(self, device: str, samples: int) -> None:
        """Give a device so many more samples, each with a label that no other of its samples has."""
        with (self.folder / f"{device}.jsonl").open("a") as file:
            first = self.first[device] + self.fed[device]
            samples = min(samples, MOST_SAMPLES - first)
            for index in range(first, first + samples):
                text = " ".join(WORDS[(index // len(WORDS) ** place) % len(WORDS)] for place in range(3))
                file.write(json.dumps({"text": text, "label": _LABELS[index]}) + "\n")
        self.fed[device] += samples

    def kill(self, process: Process) -> None:
        """SIGKILL, and wait for the end."""
        process.kill()
        process.wait()

    def dies(self, process: Process, name: str) -> None:
        """Give the devices work until a process comes to its fault point."""
        deadline_s = time.monotonic() + _WAIT_S
        while process.poll() is None:
            assert time.monotonic() < deadline_s, f"{name} never came to its fault point: {self.log(name)}"
            for device, count in list(self.fed.items()):
                if count < MOST_SAMPLES:
                    self.feed(device, 1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        assert process.returncode == -signal.SIGKILL, (process.returncode, self.log(name))

    def cut_power(self, name: str) -> int:
        """What a power cut within the last commit may leave: the WAL ends somewhere in its pages.

        Returns:
            Bytes that were cut off.
        """
        note = json.loads((self.folder / f"{name}.note").read_text())
        wal = Path(note["wal"])
        size = wal.stat().st_size
        if size <= note["synced"]:  # the WAL was begun anew: its pages lie among older ones
            return 0
        keep = self.rng.randrange(note["synced"], size)
        os.truncate(wal, keep)
        return int(size - keep)

    def kill_broker(self, *, forget: bool, down_s: float = 0.0) -> None:
        """SIGKILL to the broker, and a new one on the same port."""
        os.kill(self.broker.pid, signal.SIGKILL)
        until(lambda: not self.broker.running, "the broker is dead")
        if forget:
            for path in self.broker.data_dir.glob("mosquitto.db*"):
                path.unlink()
        time.sleep(down_s)
        self.broker.start()
        self.broker.wait_ready()

    def damage(self, path: Path) -> None:
        """Change every byte of one page of a file, any but the first."""
        data = bytearray(path.read_bytes())
        start = _PAGE * self.rng.randrange(1, len(data) // _PAGE)
        data[start : start + _PAGE] = bytes(byte ^ 0xA5 for byte in data[start : start + _PAGE])
        path.write_bytes(bytes(data))

    def complains(self, name: str) -> bool:
        """Whether a process has said, since the last time that it was asked, that its disk is at fault."""
        log = (self.folder / f"{name}.log").read_text()
        said, self._read[name] = log[self._read.get(name, 0) :], len(log)
        return any(word in said for word in ("disk", "readonly", "read-only", "Read-only"))

    def says(self, name: str, words: str) -> bool:
        """Whether a process has said something."""
        return words in (self.folder / f"{name}.log").read_text()

    # --- what has arrived ----------------------------------------------------------------------------

    def journaled(self) -> int:
        """Samples in the journal now."""
        try:
            journal = Journal(self.trainer_state / FILE_NAME, read_only=True)
        except SidestreamError:
            return 0
        with contextlib.closing(journal):
            return journal.samples()

    def await_samples(self, samples: int | None = None, *, timeout_s: float = _WAIT_S) -> None:
        """Wait until so many are journaled, or all that were fed."""
        wanted = sum(self.fed.values()) - self.dropped if samples is None else samples
        until(lambda: self.journaled() >= wanted, f"{wanted} samples are journaled", timeout_s)

    def backlog(self) -> int:
        """Records that the newest checkpoint does not include."""
        state = self.state()
        return state.records - state.checkpoint_offset if state else 0

    def reported_drops(self) -> int:
        """Samples that devices say they dropped, as the trainer shows it."""
        log = (self.folder / "trainer.log").read_text().splitlines()
        url = next(line.split()[1].rstrip(";") for line in log if line.startswith("metrics: "))
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return int(
            sum(
                float(line.split()[1])
                for line in lines
                if line.startswith("sidestream_device_samples_dropped")
            )
        )

    def learnt(self) -> int:
        """Samples that the newest checkpoint includes."""
        state = self.state()
        return state.samples_trained_unique if state else 0

    def contents(self) -> Counter[tuple[str, int]]:
        """How often each sample is in the journal, by device and label."""
        journal = Journal(self.trainer_state / FILE_NAME, read_only=True)
        with contextlib.closing(journal):
            owners = {state.stream: state.device for state in journal.streams()}
            found: Counter[tuple[str, int]] = Counter()
            for offset, _ in journal.batches(journal.tail):
                batch = unpack(ActivationBatch, journal.get(offset).payload)
                found.update(
                    (owners[batch.stream], target) for target in np.asarray(batch.read_targets()).tolist()
                )
        return found

    def settle(self, row: str, seed: int, rounds: int, trainer: Process) -> Outcome:
        """Stop the trainer once it has learnt everything, and account for it."""
        until(lambda: self.learnt() == self.journaled(), "the trainer has learnt it all", _WAIT_S)
        self.stop(trainer, "trainer")
        found = self.contents()
        wanted = {
            (self.names.get(device, device), self.first[device] + index)
            for device, count in self.fed.items()
            for index in range(count)
        }
        state = str(self.trainer_state)
        verdict = self.run("trainer", "verify", "--state-dir", state, patience_s=_FOLD_S)
        return Outcome(
            row=row,
            seed=seed,
            rounds=rounds,
            samples=len(wanted),
            lost=len(wanted - found.keys()) - self.dropped,
            twice=sum(count - 1 for count in found.values()) + len(found.keys() - wanted),
            verified="the digest matches" in verdict,
            notes=self.notes,
        )


def _lines(settings: dict[str, str]) -> str:
    return "".join(f"{key} = {value}\n" for key, value in settings.items())


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


Row = Callable[[Bench, str, int, int], Outcome]
"""Sets up a fleet for a row of that name and seed, strikes so many times, and accounts."""
