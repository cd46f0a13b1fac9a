"""What a benchmark trains on: the data, the tiers, the deal to devices. Reads files, knows no network."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_agent.config import DataConfig
from edge_agent.samples.sources import open_source
from side_trainer.settings.implied import with_implied
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import ConfigError, DataError
from sidestream.demo.shards import Example

JOB = "benchmark"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Data and tiers; the same for every row of a table and every seed."""

    train: list[Example]
    """Training samples."""
    evaluation: list[Example]
    """Evaluation samples; one with a label that is never trained counts as answered wrongly."""
    labels: tuple[str, ...]
    """Those of the training data, sorted."""
    tiers: Mapping[str, int]
    """Tiers, with the backbone's layers that each uses; 0 for all."""
    backbone: str
    """Reference to the frozen model."""
    backbones: Mapping[str, str] = field(default_factory=dict)
    """By tier, where it has another one."""

    way: Mapping[str, Any] = field(default_factory=dict)
    """How every tier taps and sends, as trainer.toml has it, where it is not the default."""

    privacy: str = ""
    """The job's setting of that name."""

    def backbone_of(self, tier: str) -> str:
        """Reference to a tier's frozen model."""
        return self.backbones.get(tier, self.backbone)

    @property
    def deepest(self) -> str:
        """The tier with the most layers of the main backbone: where what needs all of it is measured."""
        return max(self.tiers, key=lambda tier: (tier not in self.backbones, self.tiers[tier] or 10**6))

    def config(self, state_dir: Path, seed: int, tiers: Sequence[str] = ()) -> TrainerConfig:
        """The trainer's settings, all defaults, for a job with some of the tiers, or all."""
        settings = {
            "job": JOB,
            "state_dir": str(state_dir),
            "labels": self.labels,
            "tiers": {
                tier: {**self.way, "backbone": self.backbone_of(tier), "layers": self.tiers[tier]}
                for tier in tiers or self.tiers
            },
            "learner": {"seed": seed},
            "privacy": self.privacy,
            "metrics_port": -1,
            "page": False,
            "log_level": "warning",
        }
        return msgspec.convert(with_implied(settings), TrainerConfig)


def read_workload(
    train: str,
    evaluation: str,
    *,
    tiers: Mapping[str, int],
    backbone: str,
    max_samples: int,
    backbones: Mapping[str, str] | None = None,
) -> Workload:
    """Read the data; with ``max_samples`` keep a random part of the training data, the same every time.

    Raises:
        ConfigError: if a tier with a backbone of its own is none.
        DataError: if there is nothing to learn.
    """
    if strange := sorted(set(backbones or {}) - set(tiers)):
        raise ConfigError("--tier-backbone", f"{strange[0]!r} is none of the tiers {', '.join(tiers)}")
    samples = _examples("--train", train)
    if 0 < max_samples < len(samples):
        chosen = np.random.default_rng(0).permutation(len(samples))[:max_samples]
        samples = [samples[index] for index in sorted(chosen)]
    labels = tuple(sorted({example.label for example in samples}))
    if len(labels) < 2:
        raise DataError(f"{train}: the samples have {len(labels)} label; there is nothing to learn")
    return Workload(
        train=samples,
        evaluation=_examples("--eval", evaluation),
        labels=labels,
        tiers=dict(tiers),
        backbone=backbone,
        backbones=dict(backbones or {}),
    )


def read_examples(path: str) -> list[Example]:
    """Every labelled row of a JSONL, CSV or TSV file, as an agent reads it."""
    with contextlib.closing(open_source(DataConfig(path=path))) as source:
        rows = [row for row in source.read() if row.label is not None and not row.row.is_blank]
    return [Example(row.row.text, row.label or "") for row in rows]


def _examples(option: str, path: str) -> list[Example]:
    """Of a benchmark's option, where an agent's setting would be ``data.path``."""
    try:
        return read_examples(path)
    except DataError as exc:
        raise ConfigError(option, str(exc).removeprefix("data.path: ")) from exc


def write_examples(path: Path, examples: Sequence[Example]) -> Path:
    """Write JSONL that an agent reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(example._asdict(), ensure_ascii=False) for example in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def parse_tiers(text: str) -> dict[str, int]:
    """``full:0,first4:4`` -> layers by tier.

    Raises:
        ValueError: if it is not written like that.
    """
    pairs = [part.partition(":") for part in text.split(",")]
    if not all(name and digits.isdigit() for name, _, digits in pairs):
        raise ValueError(f"{text!r}: write NAME:LAYERS,NAME:LAYERS, with 0 for all layers")
    return {name: int(digits) for name, _, digits in pairs}


def parse_backbone(text: str) -> tuple[str, str]:
    """``narrow=/some/folder`` -> tier and reference.

    Raises:
        ValueError: if it is not written like that.
    """
    tier, equals, reference = text.partition("=")
    if not (tier and equals and reference):
        raise ValueError(f"{text!r}: write TIER=BACKBONE")
    return tier, reference
