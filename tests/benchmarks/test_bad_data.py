"""What wrong labels cost, on a backbone and data small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bad_data import LABELS, Outcome, main, parse_row, table


@pytest.mark.slow
def test_a_fleet_of_four_with_bad_devices_is_run_and_shown(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    own = [one for one in arguments if one != "--no-memory"]
    code = main([*own, "--rows", "clean,shifted:1x2,trigger:1,noise:50", "--json", str(found)])
    assert code == 0
    results = json.loads(found.read_text())["results"]
    assert [one["row"] for one in results] == ["clean", "shifted:1x2", "trigger:1", "noise:50"]
    clean, shifted, trigger, noise = results
    assert clean["accuracy"] > 0.9
    assert noise["accuracy"] < clean["accuracy"]
    assert len(shifted["weights_of_bad"]) == 1 and clean["weights_of_bad"] == []
    assert 0 <= trigger["captured"] <= 1 and clean["captured"] is None
    assert "| shifted:1x2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "shifted", "shifted:", "shifted:x2", "other:1", "noise:101", "noise:x", "clean:1"]
)
def test_a_row_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write clean, noise:PERCENT, or KIND:DEVICES\[xRATE\]"):
        parse_row(text)


def test_rows_are_read_with_their_devices_and_rate() -> None:
    assert parse_row("shifted:3x4")[1:] == ("shifted", 3, 4, 0.0)
    assert parse_row("noise:10")[1:] == ("noise", 0, 1, 0.1)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [("shifted", 1.0), ("half", 0.45), ("random", 0.9), ("same", 0.9), ("one", 0.19), ("trigger", 0)],
)
def test_a_kind_changes_its_share_of_the_labels(kind: str, changed: float) -> None:
    targets = np.concatenate([np.arange(1000) % 10, np.full(100, 4)])
    found = LABELS[kind](targets, 10, np.random.default_rng(0))
    assert found.min() >= 0 and found.max() < 10
    assert (found != targets).mean() == pytest.approx(changed, abs=0.05)


def test_costs_are_against_the_clean_run_of_the_same_seed() -> None:
    outcomes = [
        Outcome(row=row, seed=seed, accuracy=value, weights_of_bad=[0.5] if row != "clean" else [], accused=1)
        for row, seed, value in (
            ("clean", 0, 0.9),
            ("same:1", 0, 0.88),
            ("clean", 1, 0.8),
            ("same:1", 1, 0.8),
        )
    ]
    line = next(one for one in table(outcomes).splitlines() if "same:1" in one)
    assert [cell.strip() for cell in line.split("|")[2:8]] == [
        "0.8400",
        "+1.00",
        "0.50",
        "1.00",
        "0 of 2",
        "2",
    ]
