"""What a row of the accuracy table holds for one seed, and the JSON file that keeps everything."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(kw_only=True)
class Measured:
    """One method, one seed."""

    row: str
    """The method."""
    seed: int
    """Of the deal, the order and the learner."""
    accuracy: dict[str, float]
    """By tier; of a method without tiers, by the one tier that it used."""
    macro_f1: dict[str, float] = field(default_factory=dict)
    """By tier, where it was measured."""
    trainable: int
    """Parameters trained: of the deepest tier's network, where tiers have their own."""
    device_cpu_s: float
    """Of all devices together; of a centralised method, of the one machine (mean over tiers)."""
    bytes_up: float | None = None
    """Payload bytes a device sends, mean over devices; None where nothing travels."""
    bytes_down: float | None = None
    """Payload bytes a device receives."""
    forwards: float
    """Forward passes a training sample, on a device."""
    backwards: float
    """Backward passes a training sample, on a device."""
    peak_bytes: int | None = None
    """A device's peak memory above the loaded model."""
    rounds: list[float] = field(default_factory=list)
    """Accuracy after each round, of a method with rounds."""
    wall_s: float = 0.0
    """What the run took here."""

    @property
    def mean(self) -> float:
        """Accuracy, mean over tiers."""
        return sum(self.accuracy.values()) / len(self.accuracy)


def about_this_run() -> dict[str, Any]:
    """Commit, machine and command, for a JSON file; taken at the start: the commit may change."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "machine": {
            "processor": _processor(),
            "processors": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "command": shlex.join(["python", *sys.argv]),
    }


def write_json(path: Path, about: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write results with what :func:`about_this_run` said."""
    path.write_text(json.dumps({**about, **content}, indent=2) + "\n", encoding="utf-8")


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        ended = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ended.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
