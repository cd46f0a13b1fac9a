"""What several trainers make is compared with what one does. That they fold is seen in tests/faults."""

from __future__ import annotations

from benchmarks.cells import Outcome, table


def test_rates_are_told_as_ratios_of_the_first_number_of_ranks() -> None:
    outcomes = [
        Outcome(
            ranks=ranks,
            seed=0,
            samples=100,
            wall_s=wall,
            processor_s=cost,
            updates=9,
            accuracy=0.5,
            alike=True,
        )
        for ranks, wall, cost in ((1, 10.0, 8.0), (2, 5.0, 5.0))
    ]
    last = [cell.strip() for cell in table(outcomes).splitlines()[-1].split("|")[1:-1]]
    assert last == ["2", "0.5000", "20", "2.00", "1.60", "9", "yes"]
