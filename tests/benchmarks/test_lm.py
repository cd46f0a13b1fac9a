"""The language-model benchmark pretrains, adapts and compares."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.lm import main
from benchmarks.lm_data import read_lm_workload
from benchmarks.lm_rows import ROWS
from benchmarks.lm_steps import LM_STEPS, Loaded
from benchmarks.lm_table import LmMeasured, fleet_over_central, gap_closed, lm_table
from benchmarks.shapes import random_decoder, random_texts
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from tests.agent.tiny import WORDS

_FEW = ["--vocabulary", "300", "--width", "32", "--layers", "2", "--pretrain-minutes", "0.02", "--no-memory"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """What the program is started with, but for the rows."""
    before = _write(tmp_path / "before.txt", WORDS[:12], 600)
    after = _write(tmp_path / "after.txt", ["thou", "shalt", "heat", *WORDS[8:12]], 500)
    return [
        *("--pretrain", str(before), "--adapt", str(after), "--cache", str(tmp_path / "cache")),
        *("--devices", "2", "--threads", "1", "--max-tokens", "32", *_FEW),
    ]


def _write(path: Path, words: list[str], lines: int) -> Path:
    rng = np.random.default_rng(0)
    path.write_text("".join(" ".join(rng.choice(words, size=8)) + "\n" for _ in range(lines)))
    return path


def _run(arguments: list[str], tmp_path: Path, *more: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main([*arguments, "--json", str(out), *more]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_model_itself_is_tuned_for_comparison(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--lora-epochs", "1", "--full-epochs", "1", "--full-rate", "0.002")
    found = _run(arguments, tmp_path, "--rows", "frozen,lora,full", *few)
    by_row = {result["row"]: result for result in found["results"]}
    assert by_row["full"]["perplexity"] < by_row["lora"]["perplexity"] < by_row["frozen"]["perplexity"]
    assert by_row["frozen"]["trainable"] < by_row["lora"]["trainable"] < by_row["full"]["trainable"]
    assert found["gap_closed"]["lora"] == pytest.approx(1.0)
    assert found["model"]["report"]["parameters"] == by_row["full"]["trainable"]
    printed = capsys.readouterr()
    assert "| lora" in printed.out and "pretraining into" in printed.err
    _run(arguments, tmp_path, "--rows", "frozen")
    assert "pretraining into" not in capsys.readouterr().err, "it is cached"


def test_side_networks_learn_centrally_and_in_a_fleet(arguments: list[str], tmp_path: Path) -> None:
    few = [f"--set={name}" for name in ("learner.replay=0", "learner.learning_rate=0.01", "tier.codec=int4")]
    found = _run(arguments, tmp_path, "--rows", "frozen,fleet,central", *few)
    by_row = {result["row"]: result for result in found["results"]}
    for row in ("fleet", "central"):
        assert by_row[row]["perplexity"] < 0.8 * by_row["frozen"]["perplexity"]
        assert by_row[row]["forwards"] == 1 and by_row[row]["backwards"] == 0
        assert by_row[row]["up_per_token"] > 32 * 2 / 2 and by_row[row]["down_per_token"] > 0
    assert abs(found["fleet_over_central"]) < 0.2


@pytest.mark.slow
def test_split_models_learn_in_a_fleet(arguments: list[str], tmp_path: Path) -> None:
    few = ("--set=learner.learning_rate=0.02", "--set=split.passes=2", "--share=0.5")
    found = _run(arguments, tmp_path, "--rows", "frozen,split-lora,split-frozen", *few)
    by_row = {result["row"]: result for result in found["results"]}
    lora, frozen = by_row["split-lora"], by_row["split-frozen"]
    for row in (lora, frozen):
        assert row["perplexity"] < 0.9 * by_row["frozen"]["perplexity"]
        assert row["up_per_token"] > 0
    assert lora["forwards"] == 2 and lora["backwards"] == 2 and lora["down_per_token"] > 0
    assert frozen["forwards"] == 1 and frozen["backwards"] == 0
    assert frozen["up_per_token"] < lora["up_per_token"]


@pytest.mark.parametrize("method", LM_STEPS)
def test_every_step_runs(method: str) -> None:
    whole, tokenizer = random_decoder("tiny-projected")
    step = LM_STEPS[method](Loaded(whole, TorchLanguageModel(whole, tokenizer)), 16)
    step.warm(["w1 w2"])
    traffic = step.run(random_texts(4, 17))
    assert (traffic.up > 4 * 16 * 64) == (step.trainable == 0) == (method == "lm-agent")


def test_a_setting_of_the_trainer_that_is_none_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--rows", "fleet", "--set", "learner.pases=3"]) == 1
    assert "pases" in capsys.readouterr().err


def test_no_line_goes_to_two_devices_or_is_held_out_too(tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(3000)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))
    work = read_lm_workload(path, backbone="none", devices=4, max_tokens=16)
    parts = [*work.shards, work.held_out]
    found = [line for part in parts for document in part for line in document.splitlines()]
    assert found == lines and all(parts)
    assert len(work.held_out) == pytest.approx(sum(map(len, parts)) / 10, abs=1)


def test_the_gap_is_what_lora_takes_off_the_logarithm() -> None:
    results = [
        _measured("frozen", math.exp(6.0)),
        _measured("lora", math.exp(4.0)),
        _measured("central", math.exp(4.5)),
        _measured("fleet", 1.02 * math.exp(4.5)),
    ]
    assert gap_closed(results, "central") == pytest.approx(0.75)
    assert fleet_over_central(results) == pytest.approx(0.02)
    assert "75 %" in lm_table(results) and "+2.00 %" in lm_table(results)
    assert gap_closed(results, "full") is None


def test_a_text_that_cannot_be_read_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--adapt", str(tmp_path / "missing.txt")]) == 1
    assert "missing.txt" in capsys.readouterr().err


def test_a_wrong_row_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--rows", f"{next(iter(ROWS))},nonsense"])
    assert "nonsense" in capsys.readouterr().err


def _measured(row: str, perplexity: float) -> LmMeasured:
    return LmMeasured(
        row=row, seed=0, perplexity=perplexity, trainable=10, device_cpu_s=1.0, forwards=1, backwards=0
    )
