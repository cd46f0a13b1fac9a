"""Longest remaining tail first: what it is worth over first come, first served, and that it never costs."""

from __future__ import annotations

from random import Random
from statistics import mean

import pytest

from benchmarks.split_queue import Simulation, devices, gains, knowing
from side_trainer.split_lora.schedule import Arrival, Tails, order, together

PAPER = (1, 1, 2, 3, 4, 6)
LATER = -0.01


def arrival(
    offset: int, device: str = "d", *, cut: int = 1, remaining: float = 1, work: float = 1
) -> Arrival:
    return Arrival(offset=offset, device=device, cut=cut, remaining=remaining, work=work)


def offsets(found: list[Arrival]) -> list[int]:
    return [one.offset for one in found]


@pytest.mark.parametrize(("tflops", "least"), [(3, 0.05), (6, 0.09), (12, 0.10), (25, 0.05)])
def test_a_round_of_one_batch_each_is_over_sooner(tflops: float, least: float) -> None:
    found = gains("longest-tail", PAPER, tflops, draws=300)
    assert mean(found) >= least
    assert min(found) >= LATER


@pytest.mark.parametrize("tflops", [1, 52, 1000])
def test_where_there_is_nothing_to_gain_nothing_is_lost(tflops: float) -> None:
    """The trainer is what everybody waits for, or nobody waits."""
    found = gains("longest-tail", PAPER, tflops, draws=300)
    assert mean(found) >= 0
    assert min(found) >= LATER


def test_devices_of_one_cut_gain_by_their_speeds() -> None:
    found = gains("longest-tail", (3,), 3, draws=100)
    assert mean(found) >= 0.15
    assert min(found) >= LATER
    assert mean(gains("workload", (3,), 3, draws=100)) == pytest.approx(0)


@pytest.mark.parametrize(
    ("batches", "window", "least"), [(4, 1, 0.07), (4, 2, 0.08), (16, 1, 0.045), (16, 2, 0.06)]
)
def test_with_several_batches_a_round_what_remains_counts(batches: int, window: int, least: float) -> None:
    """Tails are measured as they are in a job, in one round before."""
    found = gains("longest-tail", PAPER, 12, draws=40, batches=batches, window=window, rounds=1)
    assert mean(found) >= least
    assert min(found) >= LATER
    by_work = gains("workload", PAPER, 12, draws=40, batches=batches, window=window, rounds=1)
    assert mean(by_work) < mean(found) - 0.03


def test_a_fleet_of_two_dozen_gains_as_well() -> None:
    found = gains("longest-tail", PAPER, 52, draws=20, batches=4, window=2, rounds=1, count=24)
    assert mean(found) >= 0.10
    assert min(found) >= LATER


def test_a_window_of_two_is_worth_more_than_any_order() -> None:
    fleet = devices(Random(3), PAPER)
    one, two = (Simulation(fleet, 12, "longest-tail", 16, window, knowing(fleet)).run() for window in (1, 2))
    assert two <= 0.85 * one


def test_the_longest_remaining_tail_is_first() -> None:
    waiting = [
        arrival(1, "quick", remaining=9),
        arrival(2, "slow", remaining=2),
        arrival(3, "unknown", remaining=3),
    ]
    assert offsets(order(waiting, {"quick": 1.0, "slow": 5.0}, "longest-tail")) == [2, 1, 3]
    assert offsets(order(waiting, {"quick": 1.0, "slow": 7.0}, "longest-tail")) == [2, 3, 1]  # 14, 12, 9
    assert offsets(order(waiting, {}, "longest-tail")) == [1, 3, 2]


def test_equals_are_served_as_they_came() -> None:
    waiting = [arrival(5), arrival(3), arrival(4)]
    for policy in ("longest-tail", "fifo", "workload"):
        assert offsets(order(waiting, {}, policy)) == [3, 4, 5]


def test_workload_puts_the_most_work_first() -> None:
    waiting = [arrival(1, work=2), arrival(2, work=3)]
    assert offsets(order(waiting, {"d": 1.0}, "workload")) == [2, 1]


def test_a_pass_is_shared_by_other_devices_of_one_cut() -> None:
    waiting = [
        arrival(1, "a"),
        arrival(2, "a"),
        arrival(3, "b", cut=2),
        arrival(4, "c"),
        arrival(5, "d"),
        arrival(6, "e"),
    ]
    assert offsets(together(waiting, 3)) == [1, 4, 5]
    assert offsets(together(waiting, 1)) == [1]


def test_a_tail_is_a_running_mean_from_an_answer_to_what_came_of_it() -> None:
    tails = Tails()
    tails.returned("a", b"x", 9.0)
    assert not tails.mean_s
    tails.answered("a", b"x", 10.0)
    tails.returned("a", b"x", 12.0)
    assert tails.mean_s == {"a": 2.0}
    tails.answered("a", b"y", 20.0)
    tails.returned("a", b"y", 21.0)
    assert tails.mean_s == {"a": pytest.approx(0.7 * 2 + 0.3 * 1)}
    tails.returned("a", b"y", 40.0)
    assert tails.mean_s == {"a": pytest.approx(1.7)}
