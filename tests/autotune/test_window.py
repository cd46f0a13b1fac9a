"""Telemetry summed up, window by window."""

from __future__ import annotations

from typing import Any

import pytest

from side_trainer.autotune.window import Measured, Meter
from sidestream.contract.messages import Telemetry

STREAM = "0" * 32
WINDOW_S = 100.0


def told(step: int = 0, **changes: object) -> Telemetry:
    """A device that forwards two samples, and is half a second at it, every second."""
    figures: dict[str, object] = {
        "stream": STREAM,
        "samples_forwarded": 1000 + 20 * step,
        "forward_seconds": 50 + 5.0 * step,
        "sending_seconds": 3 + 1.0 * step,
        "rss_bytes": 200,
        "memory_free_bytes": 600,
        "temperature_celsius": 50.0,
        "outbox_bytes": 10,
        "outbox_max_bytes": 40,
    }
    return Telemetry(**{**figures, **changes})  # type: ignore[arg-type]


def windows(meter: Meter, reports: list[tuple[float, Telemetry]], version: int = 0) -> list[Measured]:
    found = [meter.add(one, now, version) for now, one in reports]
    return [one for one in found if one is not None]


def steps(first: int = 0, count: int = 11, **changes: Any) -> list[tuple[float, Telemetry]]:
    return [(10.0 * step, told(step, **changes)) for step in range(first, first + count)]


def test_a_window_is_what_happened_in_it() -> None:
    [found] = windows(Meter(WINDOW_S), steps())
    assert found == Measured(samples=200, sample_s=0.25, memory=0.25, celsius=50.0, sending=0.1, outbox=0.25)


def test_windows_follow_one_another() -> None:
    found = windows(Meter(WINDOW_S), steps(count=31))
    assert [one.samples for one in found] == [200, 200, 200]


def test_the_largest_share_of_memory_counts() -> None:
    reports = steps()
    reports[4] = (40.0, told(4, rss_bytes=600, memory_free_bytes=200))
    [found] = windows(Meter(WINDOW_S), reports)
    assert found.memory == 0.75


@pytest.mark.parametrize("hot, celsius", [(1, 50.0), (2, 80.0)])
def test_a_tenth_of_the_time_a_board_may_be_hotter(hot: int, celsius: float) -> None:
    reports = steps()
    for step in range(hot):
        reports[step] = (10.0 * step, told(step, temperature_celsius=80.0))
    [found] = windows(Meter(WINDOW_S), reports)
    assert found.celsius == celsius


def test_what_is_not_told_is_not_known() -> None:
    dumb: dict[str, Any] = {
        "sending_seconds": 0.0,
        "memory_free_bytes": 0,
        "temperature_celsius": None,
        "outbox_max_bytes": 0,
    }
    [found] = windows(Meter(WINDOW_S), steps(**dumb))
    assert (found.memory, found.celsius, found.sending, found.outbox) == (None, None, None, None)


def test_too_few_samples_say_nothing_of_time() -> None:
    [found] = windows(Meter(WINDOW_S), [(now, told(0)) for now, _ in steps()])
    assert (found.samples, found.sample_s) == (0, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": "1" * 32},
        {"samples_forwarded": 0},
        {"forward_seconds": 0.0},
        {"sending_seconds": 0.5},
    ],
)
def test_a_counter_that_falls_begins_a_window_anew(changes: dict[str, object]) -> None:
    reports = steps()
    reports[5:] = [(now, told(step, **changes)) for step, (now, _) in enumerate(reports[5:], 5)]
    meter = Meter(WINDOW_S)
    assert windows(meter, reports) == []
    [found] = windows(meter, [(now, told(step, **changes)) for step, (now, _) in enumerate(steps(11, 5), 11)])
    assert found.samples in (0, 200)


def test_a_silence_of_half_a_window_begins_it_anew() -> None:
    meter = Meter(WINDOW_S)
    assert windows(meter, [*steps(count=3), *steps(first=8, count=9)]) == []
    assert len(windows(meter, steps(first=17, count=2))) == 1


def test_a_device_under_another_assignment_is_not_judged() -> None:
    meter = Meter(WINDOW_S)
    assert windows(meter, steps(assignment=3)) == []
    assert windows(meter, steps(count=6), version=3) == []
    [found] = windows(meter, steps(assignment=3), version=3)
    assert found.samples == 200
