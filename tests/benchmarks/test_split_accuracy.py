"""The benchmark of the split methods runs every row, and counts what travels and what is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.split_accuracy import main
from benchmarks.split_rows import FORMS, ROWS


@pytest.fixture
def data(arguments: list[str]) -> list[str]:
    """The data and the backbone of the accuracy benchmark, a split fleet."""
    return [*arguments[: arguments.index("--tiers")], "--tiers", "cut1:1,cut2:2", "--devices", "4"]


def _run(data: list[str], tmp_path: Path, *more: str) -> dict[str, dict[str, Any]]:
    out = tmp_path / "out.json"
    fast = ["--seeds", "3", "--set", "learner.learning_rate=5e-3", "--set", "learner.warmup_updates=4"]
    assert main([*data, *fast, "--json", str(out), *more]) == 0
    found = json.loads(out.read_text())
    assert found["commit"] and found["command"] and found["machine"]["processors"]
    return {result["row"]: result for result in found["results"]}


@pytest.mark.slow
def test_forms_are_held_against_one_machine(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run(data, tmp_path, "--rows", "central,held,frozen")
    central, held, frozen = (found[row] for row in ("central", "held", "frozen"))
    assert held["mean"] > 0.8 and central["mean"] > 0.8
    assert set(held["accuracy"]) == {"all"} and set(frozen["accuracy"]) == {"cut1", "cut2"}
    assert held["forwards"] == held["backwards"] == 3
    assert (frozen["forwards"], frozen["backwards"]) == (1, 0)
    assert frozen["down"] == 0 and 0 < frozen["up"] < held["up"]
    assert held["down"] > 0 and held["versions"] > 1
    printed = capsys.readouterr().out
    assert "| held" in printed and "to central" in printed


@pytest.mark.slow
def test_adapters_may_be_the_devices_own(data: list[str], tmp_path: Path) -> None:
    rounds = ("--set", "split.passes=2", "--rows", "local,per-device")
    found = _run(data, tmp_path, *rounds)
    for row in ("local", "per-device"):
        assert found[row]["rounds"] >= 1 and found[row]["versions"] == found[row]["rounds"] + 1
        assert found[row]["forwards"] == found[row]["backwards"] == 2


@pytest.mark.slow
def test_answers_may_be_late_or_lost(data: list[str], tmp_path: Path) -> None:
    few = ("--set", "split.passes=2", "--set", "split.reuse_below=0.5")
    found = _run(data, tmp_path, *few, "--rows", "held,held-late,held-lost,held-in-step")
    assert found["held-late"]["late"] > found["held"]["late"] > found["held-in-step"]["late"]
    assert 0.5 < found["held-lost"]["backwards"] < 1.5 < found["held"]["backwards"]
    assert found["held"]["reused"] > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("pace", ["even", "own"])
def test_a_run_is_the_same_again(data: list[str], tmp_path: Path, pace: str) -> None:
    few = ("--rows", "held", "--pace", pace, "--set", "split.passes=1")
    one, other = (_run(data, tmp_path, *few)["held"] for _ in range(2))
    for name in ("accuracy", "up", "down", "late", "duration", "versions"):
        assert one[name] == other[name], name


def test_every_row_is_offered(data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ("central", *FORMS) == ROWS
    with pytest.raises(SystemExit):
        main([*data, "--rows", "held,nonsense"])
    assert "nonsense" in capsys.readouterr().err
