"""What the language-model benchmark adapts to: a text, its end held out, the rest dealt out to devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from benchmarks.lm_pretrain import read_text
from benchmarks.workload import JOB
from side_trainer.settings.implied import with_implied
from side_trainer.settings.schema import TrainerConfig
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.backbone.windows import Window
from sidestream.contract.errors import DataError
from sidestream.contract.tasks import Task
from sidestream.host.toml import load_config

TIER: Final = "devices"
_OF_TIER: Final = "tier."

_DOCUMENT_CHARS = 2000
_HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class LmWorkload:
    """The same for every row of a table."""

    backbone: str
    """Folder of the frozen model."""
    shards: tuple[tuple[str, ...], ...]
    """By device, its documents: runs of whole lines. No two devices have a line in common."""
    held_out: tuple[str, ...]
    """Documents that nobody trains on."""
    max_tokens: int
    """Tokens of a window."""

    @property
    def train(self) -> list[str]:
        """Every device's documents."""
        return [document for shard in self.shards for document in shard]

    def config(self, state_dir: Path, seed: int, settings: Mapping[str, str]) -> TrainerConfig:
        """The trainer's settings, as :func:`trainer_settings`."""
        own = {"state_dir": str(state_dir), "learner.seed": str(seed), "log_level": "warning"}
        return trainer_settings(self.backbone, self.max_tokens, {**own, **settings})

    def windows(self, model: TorchLanguageModel, documents: Sequence[str]) -> list[Window]:
        """Documents as every method sees them."""
        return [window for document in documents for window in model.windows(document, None, self.max_tokens)]


def read_lm_workload(
    path: Path, *, backbone: str, devices: int, max_tokens: int, share: float = 1.0
) -> LmWorkload:
    """Cut a text: the last tenth is held out, the rest falls into a run of documents for each device.

    Args:
        path: The text.
        backbone: Folder of the frozen model.
        devices: How many.
        max_tokens: Tokens of a window.
        share: Use only so much of the text, from its beginning; the held-out tenth stays the last of all.

    Raises:
        DataError: it cannot be read, or is too short.
    """
    documents = _documents(read_text(path))
    cut = len(documents) - max(1, round(len(documents) * _HELD_OUT))
    train = documents[: round(cut * share)]
    if len(train) < devices:
        raise DataError(f"{path}: {len(train)} documents are too few for {devices} devices")
    bounds = [round(index * len(train) / devices) for index in range(devices + 1)]
    return LmWorkload(
        backbone=backbone,
        shards=tuple(tuple(train[start:end]) for start, end in pairwise(bounds)),
        held_out=tuple(documents[cut:]),
        max_tokens=max_tokens,
    )


def trainer_settings(backbone: str, max_tokens: int, settings: Mapping[str, str]) -> TrainerConfig:
    """What the task implies, and what ``settings`` say by dotted name; ``tier.…`` is of the only tier.

    Raises:
        ConfigError: if one of them is none.
    """
    tier: dict[str, Any] = {"backbone": backbone, "max_tokens": max_tokens}
    general = {"job": JOB, "task": Task.CAUSAL_LM.value, "metrics_port": "-1", "page": "false"}
    for name, value in settings.items():
        if name.startswith(_OF_TIER):
            tier[name.removeprefix(_OF_TIER)] = int(value) if value.isdigit() else value
        else:
            general[name] = value
    return load_config(
        TrainerConfig,
        overrides=general,
        complete=lambda given: with_implied({**given, "tiers": {TIER: tier}}),
    ).checked()


def _documents(text: str) -> list[str]:
    """Whole lines, some thousand characters of them together."""
    documents, lines = [], ""
    for line in text.splitlines(keepends=True):
        lines += line
        if len(lines) >= _DOCUMENT_CHARS:
            documents.append(lines)
            lines = ""
    return [*documents, lines] if lines.strip() else documents
