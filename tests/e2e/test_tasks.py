"""Every task, by the path of the demo: broker, trainer and agents as processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sidestream.cli import main
from tests.e2e.task_data import write
from tests.forked import Forked

pytestmark = [pytest.mark.minilm, pytest.mark.timeout(400)]
ROWS = 240
ASKED: dict[str, tuple[str, Any]] = {
    "multi-label-classification": ("cook some soup and book a hotel", {"food", "travel"}),
    "regression": ("the book was wonderful and perfect", 180.0),
    "token-classification": ("we saw a green cow there", ["O", "O", "O", "COLOUR", "ANIMAL", "O"]),
    "text-classification": ("play this song\twho sings this new album", "same topic"),
}


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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, headline: str, least: float
) -> None:
    train, evaluation = (
        write(tmp_path / f"{part}.jsonl", task, ROWS, seed) for seed, part in enumerate("te")
    )
    kept, report = tmp_path / "kept", tmp_path / "report.json"
    flags = ["--devices", "2", "--keep", str(kept), "--json", str(report), "--seed", "3"]
    demo = ["demo", "--task", task, "--data", str(train), "--eval", str(evaluation), *flags]
    process = Forked("sidestream.cli", *demo, out=tmp_path / "said", cwd=tmp_path)
    code, said = process.wait(300), (tmp_path / "said").read_text()
    assert code == 0, said
    found = json.loads(report.read_text())
    assert found["quality"]["overall"][headline] > least, found["quality"]
    assert found["samples"]["lost"] == found["samples"]["duplicated"] == 0
    assert found["samples"]["trained_unique"] == ROWS and found["forwards_per_sample"] == 1
    assert headline.replace("_", " ") in said
    check_answer(task, kept / "devices" / "full-01" / "state", capsys)


def check_answer(task: str, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, wanted = ASKED[task]
    predict = ["agent", "predict", "--state-dir", str(state), *(["--pair"] if "\t" in text else []), text]
    assert main([*predict, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    if task == "multi-label-classification":
        assert set(answer["labels"]) & wanted, answer
    elif task == "regression":
        assert abs(answer["value"] - wanted) < 40, answer
    elif task == "token-classification":
        assert [word["label"] for word in answer["words"]] == wanted
    else:
        assert answer["label"] in ("same topic", "another") and 0.5 <= answer["probability"] <= 1
    assert main(predict) == 0 and capsys.readouterr().out.strip()
