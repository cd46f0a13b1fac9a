"""Two hundred devices of five kinds for two weeks: it converges, within bounds, and never goes to and fro."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from math import log2
from statistics import mean, quantiles

import pytest

from side_trainer.autotune.governor import Choice
from side_trainer.autotune.window import Meter
from side_trainer.journal.records import Quantity
from tests.autotune.fleet import HOUR_S, KINDS, TUNING, Device, fleet, run, value

DAYS = 14
pytestmark = pytest.mark.slow


class Lived:
    """What came of it."""

    def __init__(self, seed: int) -> None:
        self.devices = fleet(200, seed=seed)
        self.chosen: defaultdict[str, list[tuple[float, Choice]]] = defaultdict(list)
        self.settings = {device.name: [device.setting] for device in self.devices}
        for now, device, choice in run(self.devices, 24 * DAYS):
            self.chosen[device.name].append((now / HOUR_S, choice))
            self.settings[device.name].append(choice.setting)

    def of(self, kind: str) -> list[Device]:
        return [device for device in self.devices if device.kind is KINDS[kind]]

    def second_week(self, device: Device) -> tuple[list[float], list[float], list[float]]:
        """Memory share, degrees and link share, report by report."""
        late = device.loads[len(device.loads) // 2 :]
        return [one[0] for one in late], [one[1] for one in late], [one[2] for one in late]


@pytest.fixture(scope="module")
def lived() -> Lived:
    return Lived(0)


def test_nothing_that_was_left_is_returned_to_before_its_time(lived: Lived) -> None:
    for name, chosen in lived.chosen.items():
        for what in Quantity:
            hours = [hour for hour, choice in chosen if choice.what is what]
            ups = [choice.up for _, choice in chosen if choice.what is what]
            turns = 0
            for (before_h, before_up), (hour, up) in pairwise(zip(hours, ups, strict=True)):
                if up is before_up:
                    assert hour - before_h >= (TUNING.dwell_h if up else 2 * TUNING.window_h), name
                    continue
                rested_h = TUNING.reverse_h * 2**turns if up else 2 * TUNING.dwell_h
                assert hour - before_h >= rested_h, name
                turns += up


def test_no_quantity_turns_upward_more_than_a_few_times_in_two_weeks(lived: Lived) -> None:
    most = log2(1 + 24 * DAYS / TUNING.reverse_h)
    for chosen in lived.chosen.values():
        for what in Quantity:
            ups = [choice.up for _, choice in chosen if choice.what is what]
            assert sum(up and not before for before, up in pairwise(ups)) <= most


def test_no_device_is_changed_more_often_in_a_day_than_is_allowed(lived: Lived) -> None:
    for chosen in lived.chosen.values():
        hours = [hour for hour, _ in chosen]
        for hour in hours:
            assert sum(hour - 24 < other <= hour for other in hours) <= TUNING.changes_a_day


def test_everything_that_is_chosen_lies_within_the_bounds(lived: Lived) -> None:
    for device in lived.devices:
        known = device.governor.choices
        for setting in lived.settings[device.name]:
            assert not known.bounds.why_not(setting.assignment(run="ab" * 16, version=1, fence=1))
            assert setting.advised in known.depths


def test_it_converges(lived: Lived) -> None:
    """A few choices a device, and next to none in the second week."""
    changes = [len(chosen) for chosen in lived.chosen.values()]
    late = sum(hour > 24 * DAYS / 2 for chosen in lived.chosen.values() for hour, _ in chosen)
    assert max(changes) <= 8
    assert mean(len(lived.chosen[device.name]) for device in lived.devices) <= 3
    assert late <= 0.1 * len(lived.devices)


def test_a_device_with_room_is_left_as_it_is(lived: Lived) -> None:
    assert not any(device.records for device in lived.of("fast"))


def test_what_is_short_of_memory_comes_below_its_limit(lived: Lived) -> None:
    for device in lived.of("short of memory"):
        memory, _, _ = lived.second_week(device)
        least = device.governor.choices.bounds
        at_least = device.setting.batch_size == least.batch_size_min
        assert quantiles(memory, n=10)[-1] <= TUNING.memory_share or at_least
    batches = [device.setting.batch_size for device in lived.of("short of memory")]
    assert mean(batches) < 8


def test_what_runs_hot_cools_down(lived: Lived) -> None:
    for device in lived.of("hot"):
        _, degrees, _ = lived.second_week(device)
        assert quantiles(degrees, n=10)[-1] <= TUNING.temperature_celsius + 5
        assert device.setting.max_tokens < 128
        assert device.setting.rung == device.governor.choices.own.rung, "nothing is wrong with its link"


def test_what_has_a_thin_link_sends_less_and_is_cut_no_shorter(lived: Lived) -> None:
    for device in lived.of("thin link"):
        _, _, busy = lived.second_week(device)
        assert mean(busy) <= TUNING.link_share
        own = device.governor.choices.own
        assert device.setting.rung != own.rung
        assert (device.setting.batch_size, device.setting.max_tokens) == (own.batch_size, own.max_tokens)


def test_what_alternates_is_judged_by_its_worse_half(lived: Lived) -> None:
    for device in lived.of("alternating"):
        ups = [choice.what for _, choice in lived.chosen[device.name] if choice.up]
        assert len(ups) <= 1
        assert device.setting.batch_size < 16


@pytest.mark.parametrize("days", [1, 2])
def test_what_alternates_by_the_day_is_left_in_peace_after_some_turns(days: int) -> None:
    kind = replace(KINDS["alternating"], alternates_h=24.0 * days)
    devices = [Device(name=f"{number}", kind=kind, seed=number) for number in range(5)]
    hours = [now / HOUR_S for now, _, _ in run(devices, 24 * 60)]
    early, late = (sum(first <= hour / 24 < first + 10 for hour in hours) for first in (0, 50))
    assert 10 * late <= early


def test_a_trainer_that_starts_anew_goes_on_as_one_that_only_lost_the_windows_in_hand() -> None:
    """Everything else is in the records: the choices after are the same ones, at the same times."""
    plain, restarted = fleet(40, seed=3), fleet(40, seed=3)
    for one in (plain, restarted):
        for _ in run(one, 60):
            pass
    for device in plain:
        device.meter = Meter(TUNING.window_h * HOUR_S)
        device.governor.forget_windows()
    before = [device.setting for device in restarted]
    for device in restarted:
        device.restart()
    assert [device.setting for device in restarted] == before == [device.setting for device in plain]
    for one in (plain, restarted):
        for _ in run(one, 240, since_h=60):
            pass
    assert [device.records for device in restarted] == [device.records for device in plain]
    assert sum(len(device.records) for device in plain) > 60


def test_choices_depend_on_nothing_but_what_was_told() -> None:
    one, other = fleet(20, seed=4), fleet(20, seed=4)
    for devices in (one, other):
        for _ in run(devices, 48):
            pass
    assert [device.records for device in one] == [device.records for device in other]


def test_values_are_what_the_quantities_say() -> None:
    device = fleet(5)[1]
    for what in (Quantity.BATCH_SIZE, Quantity.MAX_TOKENS, Quantity.RUNG, Quantity.TIER):
        then = device.governor.choices.step(device.setting, what, up=False)
        assert then is not None
        changed = [each for each in Quantity if each is not Quantity.BOUNDS]
        assert [each for each in changed if value(then, each) != value(device.setting, each)] == [what]
