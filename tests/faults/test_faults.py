"""A short run of some rows of benchmarks/faults.py; the others take minutes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.cell_faults import struck
from benchmarks.fault_points import POINTS
from benchmarks.faults import ROWS, run_row
from benchmarks.poison import folds_finite, poison
from benchmarks.soak import plot, summary
from broker_config.embedded.broker import find_mosquitto
from tests.rooms import HOUSE, ROOT

pytestmark = [
    pytest.mark.mosquitto,
    pytest.mark.skipif(find_mosquitto() is None, reason="there is no mosquitto binary"),
]
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")


@pytest.mark.parametrize(
    "row",
    [
        "trainer-power-cut",
        pytest.param("device-disk-full", marks=ROOT_ONLY),
    ],
)
def test_a_fault_loses_nothing_and_counts_nothing_twice(row: str) -> None:
    outcome = run_row(row, seed=1, rounds=1)
    assert outcome.good, outcome


@pytest.mark.parametrize("row", ["rank", "all"])
def test_cells_lose_nothing_and_end_with_the_same_weights(row: str) -> None:
    outcome = struck(row, rounds=2, seed=1, tell=lambda text: None)
    assert (outcome.lost, outcome.twice, outcome.verified, outcome.alike) == (0, 0, True, True), outcome


@pytest.mark.parametrize("name", POINTS)
def test_every_fault_point_is_a_function_of_the_product(name: str) -> None:
    point = POINTS[name]
    sources = [path.read_text() for house in HOUSE for path in (ROOT / house).rglob(point.file)]
    assert any(f"    def {point.function}(" in text or f"\ndef {point.function}(" in text for text in sources)


def test_every_row_is_described_in_the_operating_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert [row for row in ROWS if f"`{row}`" not in guide] == []


def test_a_soak_is_sampled_summed_up_and_drawn(tmp_path: Path) -> None:
    samples = [
        {"s": s, "journaled": s, "trainer MiB": 300.0, "trainer files": 11.0} for s in (0.0, 60.0, 120.0)
    ]
    assert summary(samples) == [["trainer", "300", "300", "+0.0", "11", "11"]]
    plot(samples, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_mutated_messages_are_decoded_or_refused() -> None:
    outcomes, admitted, plan = poison(3000, seed=7)
    assert sum(outcomes.values()) == 3000 and not any(name.endswith("FAILED") for name in outcomes)
    assert admitted and folds_finite(admitted[:8], plan)
