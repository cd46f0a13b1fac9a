"""A tiny backbone and a task that can be learnt, in a temporary folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.agent.tiny import WORDS, save_tiny


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """What the accuracy benchmark is started with, but for rows and seeds."""
    backbone = save_tiny(tmp_path / "backbone", "bert")
    train, evaluation = (
        _write(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate(("train", "eval"))
    )
    return [
        *("--train", str(train), "--eval", str(evaluation), "--backbone", str(backbone)),
        *("--tiers", "whole:0,half:2", "--devices", "4", "--no-memory"),
    ]


def _write(path: Path, seed: int, count: int = 160) -> Path:
    """The label is in a sentence's words."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        label = ("cold", "warm")[number % 2]
        words = [*rng.choice(WORDS[:8], size=4), *[label] * 3]
        lines.append(json.dumps({"text": " ".join(rng.permutation(words)), "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path
