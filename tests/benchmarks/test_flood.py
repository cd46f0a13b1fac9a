"""A short run of benchmarks/flood.py: every honest batch is receipted while junk pours in."""

from __future__ import annotations

import pytest

from benchmarks import flood
from tests.broker.conftest import needs_mosquitto


@pytest.mark.mosquitto
@needs_mosquitto
@pytest.mark.parametrize("qos", [0, 1])
def test_honest_batches_are_receipted_in_a_flood(qos: int) -> None:
    seen = flood.run(qos, 1.0, 256)
    assert min(seen["receipts"]) > 0 and seen["junk_messages"] > 0
    assert set(seen) == {
        *("qos", "kib", "quiet_p95_s", "flood_p95_s", "ratio", "slowest_s", "receipts", "junk_messages")
    }
