"""A short run of benchmarks/faults.py: nothing lost, nothing counted twice, the digest matches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.faults import run_row
from broker_config.embedded import find_mosquitto

pytestmark = [
    pytest.mark.mosquitto,
    pytest.mark.skipif(find_mosquitto() is None, reason="there is no mosquitto binary"),
]
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")


@pytest.mark.parametrize(
    "row",
    [
        "trainer-killed-at-points",
        "trainer-power-cut",
        "agent-power-cut",
        "broker-forgets",
        "link-half-open",
        "journal-page-damaged",
        "same-name-mqtt3",
        pytest.param("device-disk-full", marks=ROOT_ONLY),
        pytest.param("trainer-disk-full", marks=ROOT_ONLY),
    ],
)
def test_a_fault_loses_nothing_and_counts_nothing_twice(row: str) -> None:
    outcome = run_row(row, seed=1, rounds=1)
    assert outcome.good, outcome


def test_every_row_is_described_in_the_operating_guide() -> None:
    from benchmarks.faults import ROWS

    guide = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert [row for row in ROWS if f"`{row}`" not in guide] == []
