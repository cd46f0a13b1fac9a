"""Few samples are not starved by the share that is held out of them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge_agent.batches.intake import Intake
from edge_agent.batches.patience import Patience
from edge_agent.batches.rungs import Rungs
from edge_agent.samples.identities import Identities
from edge_agent.samples.sample import Row, is_held_out
from edge_agent.store.outbox import Outbox


class FakeOutbox:
    """Counts what is consumed."""

    unlabelled_max_bytes = 0

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def counters(self) -> Counter[str]:
        return self.counts

    def is_consumed(self, key: bytes) -> bool:
        return False

    def consume(self, taken: Any) -> None:
        self.counts += taken.counts


def held_of(count: int, share: float, drawn: bool) -> int:
    """How many of so many samples are held out, if the hash draws all of them, or as it does."""
    outbox = FakeOutbox()
    intake = Intake(
        cast(Outbox, outbox),
        cast(Rungs, SimpleNamespace(needs_labels=True, ready=lambda sample: [])),
        cast(Patience, SimpleNamespace(write=lambda work: work() or True)),
        share,
    )
    rows = (Row(f"text {number}", "on") for number in range(100_000))
    chosen = (row for row in rows if not drawn or is_held_out(row, share))
    identities = Identities()
    for _, row in zip(range(count), chosen, strict=False):
        intake.take(identities.name(row), "")
        intake.save()
        outbox.counts["samples_read"] += not is_held_out(row, share)
    return outbox.counts["samples_held_out"]


@pytest.mark.parametrize(("count", "most"), [(1, 1), (10, 1), (11, 2), (50, 5)])
def test_the_first_samples_are_never_held_out_for_more_than_their_share(count: int, most: int) -> None:
    assert held_of(count, 0.1, drawn=True) <= most


def test_of_many_the_hash_decides_alone() -> None:
    rows = [Row(f"text {number}", "on") for number in range(3000)]
    early = sum(is_held_out(row, 0.1) for row in rows[:100])
    assert 0 <= sum(is_held_out(row, 0.1) for row in rows) - held_of(3000, 0.1, drawn=False) <= early
