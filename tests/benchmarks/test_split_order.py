"""The benchmark of the order of service counts, and runs a throttled fleet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.split_order import main


@pytest.mark.slow
def test_it_counts_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    few = ["--tflops", "12", "--draws", "3", "--repeats", "1", "--batches", "2", "--scale", "0.001"]
    assert main([*few, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["commit"]
    assert {one["batches"] for one in found["counted"]} == {1, 4, 16}
    assert all(one["gain"] >= one["worst"] for one in found["counted"])
    assert set(found["real"][0]) == {
        f"{policy}, window {window}" for policy in ("fifo", "longest-tail") for window in (1, 2)
    }
    printed = capsys.readouterr().out
    assert "longest tail" in printed and "window 2 instead of 1" in printed
