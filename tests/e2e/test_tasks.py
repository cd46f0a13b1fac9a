"""Every task, by the path of the demo: broker, trainer and agents as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.task_data import write

pytestmark = [pytest.mark.minilm, pytest.mark.timeout(400)]
ROWS = 240
ASKED: dict[str, tuple[str, Any]] = {
    "multi-label-classification": ("cook some soup and book a hotel", {"food", "travel"}),
    "regression": ("the book was wonderful and perfect", 180.0),
    "token-classification": ("we saw a green cow there", ["O", "O", "O", "COLOUR", "ANIMAL", "O"]),
    "text-classification": ("play this song\twho sings this new album", "same topic"),
}


def sidestream(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sidestream.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("task", "headline", "least"),
    [
        ("multi-label-classification", "micro_f1", 0.75),
        ("regression", "pearson", 0.7),
        ("token-classification", "macro_f1", 0.8),
        ("text-classification", "macro_f1", 0.6),
    ],
)
def test_a_fleet_learns_the_task_and_its_devices_answer(
    tmp_path: Path, task: str, headline: str, least: float
) -> None:
    train, evaluation = (
        write(tmp_path / f"{part}.jsonl", task, ROWS, seed) for seed, part in enumerate("te")
    )
    kept, report = tmp_path / "kept", tmp_path / "report.json"
    flags = ["--devices", "3", "--keep", str(kept), "--json", str(report), "--seed", "3"]
    said = sidestream("demo", "--task", task, "--data", str(train), "--eval", str(evaluation), *flags)
    found = json.loads(report.read_text())
    assert found["quality"]["overall"][headline] > least, found["quality"]
    assert found["samples"]["lost"] == found["samples"]["duplicated"] == 0
    assert found["samples"]["trained_unique"] == ROWS and found["forwards_per_sample"] == 1
    assert headline.replace("_", " ") in said
    check_answer(task, kept / "devices" / "full-01" / "state")


def check_answer(task: str, state: Path) -> None:
    text, wanted = ASKED[task]
    pair = ["--pair"] if "\t" in text else []
    answer: dict[str, Any] = json.loads(
        sidestream("agent", "predict", "--state-dir", str(state), "--json", *pair, text)
    )
    if task == "multi-label-classification":
        assert set(answer["labels"]) & wanted, answer
    elif task == "regression":
        assert abs(answer["value"] - wanted) < 40, answer
    elif task == "token-classification":
        assert [word["label"] for word in answer["words"]] == wanted
    else:
        assert answer["label"] in ("same topic", "another") and 0.5 <= answer["probability"] <= 1
    assert sidestream("agent", "predict", "--state-dir", str(state), *pair, text).strip()
