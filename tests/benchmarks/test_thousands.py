"""A short run of benchmarks/thousands.py: everybody is there, answered, and back after a storm."""

from __future__ import annotations

import pytest

from benchmarks import thousands
from tests.broker.conftest import needs_mosquitto


@pytest.mark.mosquitto
@needs_mosquitto
def test_a_small_fleet_grows_is_measured_and_comes_back() -> None:
    seen = thousands.measure([20, 50], 10, 1.0, 1.0, 0.2, lambda text: None)
    assert [row["devices"] for row in seen["rows"]] == [20, 50]
    assert [row["online"] for row in seen["rows"]] == [21, 51], "and one real agent"
    assert all(row["unanswered"] == 0 and row["metrics_p50_ms"] > 0 for row in seen["rows"])
    assert seen["restart"]["online"] == 51
    storm = seen["storm"]
    assert (storm["struck"], storm["statuses"], storm["missing"], storm["unanswered"]) == (10, 20, 0, 0)
