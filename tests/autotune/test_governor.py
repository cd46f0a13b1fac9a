"""What one device's windows lead to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import log2

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from side_trainer.autotune.governor import Accuracy, Choice, Governor
from side_trainer.autotune.window import Measured
from side_trainer.journal.records import AssignmentRecord, Quantity
from side_trainer.settings.tuning import TuningConfig
from sidestream.contract.tensors import Codec
from tests.autotune.fleet import HOUR_S, START_UNIX_S, TUNING, choices, record_of

EASY = Measured(samples=100, sample_s=0.05, memory=0.1, celsius=40.0, sending=0.05, outbox=0.0)
"""A device with room for everything."""
BETTER = {"deep": Accuracy(0.9, 2000), "shallow": Accuracy(0.8, 2000)}
"""A deeper tier is worth its cost."""


class Ruled:
    """A governor with its records, on a clock of hours."""

    def __init__(self, tier: str = "deep", tuning: TuningConfig = TUNING, **tier_changes: object) -> None:
        self.tier, self.tuning, self.changes = tier, tuning, tier_changes
        self.hour = 0
        self.records: list[AssignmentRecord] = []
        self.governor = self.fresh()

    def fresh(self) -> Governor:
        governor = Governor(choices(self.tier, self.tuning, **self.changes), self.tuning)
        for record in self.records:
            governor.apply(record)
        return governor

    def window(self, measured: Measured, *, by: int = 1) -> Choice | None:
        """An hour passes, or several, the last of which was measured."""
        self.hour += by
        unix_s = START_UNIX_S + self.hour * HOUR_S
        choice = self.governor.decide(measured, unix_s, BETTER)
        if choice is not None:
            self.records.append(record_of(choice, self.tier, "one", unix_s))
            self.governor.apply(self.records[-1])
        return choice

    def windows(self, measured: Measured, count: int) -> list[tuple[Quantity, bool]]:
        """So many in a row; what was chosen, and whether upward."""
        made = [self.window(measured) for _ in range(count)]
        return [(one.what, one.up) for one in made if one is not None]


def test_one_bad_window_is_chance_and_two_are_not() -> None:
    ruled = Ruled()
    assert ruled.windows(replace(EASY, memory=0.9), 1) == []
    assert ruled.windows(EASY, 1) == []
    assert ruled.windows(replace(EASY, memory=0.9), 1) == []
    assert ruled.windows(replace(EASY, memory=0.9), 1) == [(Quantity.BATCH_SIZE, False)]
    assert ruled.governor.setting.batch_size == 8


@pytest.mark.parametrize(
    "bad, first",
    [
        ({"memory": 0.81}, Quantity.BATCH_SIZE),
        ({"sample_s": 20.1 / 16}, Quantity.BATCH_SIZE),
        ({"celsius": 76.0}, Quantity.MAX_TOKENS),
        ({"sending": 0.51}, Quantity.RUNG),
        ({"outbox": 0.51}, Quantity.RUNG),
    ],
)
def test_each_load_is_eased_by_what_lowers_it_as_soon_as_it_is_over_its_limit(
    bad: dict[str, float], first: Quantity
) -> None:
    assert Ruled().windows(replace(EASY, **bad), 2) == [(first, False)]  # type: ignore[arg-type]
    below = {name: value * 0.97 for name, value in bad.items()}
    assert Ruled().windows(replace(EASY, **below), 9) == []  # type: ignore[arg-type]


def test_the_load_that_is_furthest_over_its_limit_is_eased_first() -> None:
    ruled = Ruled()
    both = replace(EASY, memory=0.88, sending=0.9)
    assert ruled.windows(both, 2) == [(Quantity.RUNG, False)]
    ruled = Ruled()
    assert ruled.windows(replace(EASY, memory=0.98, sending=0.55), 2) == [(Quantity.BATCH_SIZE, False)]


def test_memory_is_eased_step_by_step_and_a_move_is_advised_once_nothing_else_is_left() -> None:
    ruled = Ruled(tuning=msgspec.structs.replace(TUNING, changes_a_day=100))
    made = ruled.windows(replace(EASY, memory=0.99), 30)
    down = [(Quantity.BATCH_SIZE, False)] * 2 + [(Quantity.MAX_TOKENS, False)] * 2
    assert made == [*down, (Quantity.TIER, False)]
    setting = ruled.governor.setting
    assert (setting.batch_size, setting.max_tokens, setting.advised) == (4, 32, "shallow")


def test_advice_to_move_down_is_given_once() -> None:
    ruled = Ruled(tier="shallow", tuning=msgspec.structs.replace(TUNING, changes_a_day=100))
    assert (Quantity.TIER, False) not in ruled.windows(replace(EASY, memory=0.99), 40)


def test_no_more_is_asked_of_a_device_than_its_tier_has_unless_the_bounds_say_so() -> None:
    assert Ruled().windows(EASY, 200) == []
    wide = msgspec.structs.replace(TUNING, batch_size_max=32, max_tokens_max=256, richer=True)
    made = Ruled(tuning=wide).windows(EASY, 100)
    assert {what for what, _ in made} == {Quantity.BATCH_SIZE, Quantity.MAX_TOKENS, Quantity.RUNG}
    assert all(up for _, up in made)


def test_more_is_asked_after_six_windows_with_room_and_the_count_begins_anew_with_a_poor_one() -> None:
    wide = msgspec.structs.replace(TUNING, batch_size_max=32)
    ruled = Ruled(tuning=wide)
    assert ruled.windows(EASY, 5) == []
    assert ruled.windows(replace(EASY, memory=0.5), 1) == []
    assert ruled.windows(EASY, 5) == []
    assert ruled.windows(EASY, 1) == [(Quantity.BATCH_SIZE, True)]


@pytest.mark.parametrize("memory, rises", [(0.31, True), (0.33, False)])
def test_what_costs_more_has_to_leave_the_margin(memory: float, rises: bool) -> None:
    """Twice the batch is taken for twice the memory: .64 of .8 at most."""
    wide = msgspec.structs.replace(TUNING, batch_size_max=32)
    made = Ruled(tuning=wide).windows(replace(EASY, memory=memory), 6)
    assert made == ([(Quantity.BATCH_SIZE, True)] if rises else [])


@pytest.mark.parametrize("memory, rises", [(0.26, True), (0.28, False)])
def test_what_was_lowered_has_to_leave_twice_the_margin_and_to_rest(memory: float, rises: bool) -> None:
    ruled = Ruled()
    assert ruled.windows(replace(EASY, memory=0.9), 2) == [(Quantity.BATCH_SIZE, False)]
    assert ruled.windows(replace(EASY, memory=memory), 23) == []
    assert ruled.windows(replace(EASY, memory=memory), 2) == ([(Quantity.BATCH_SIZE, True)] if rises else [])


def test_each_turn_upward_waits_twice_as_long() -> None:
    """A device that is bad for as long as it takes, and then fine, of which only batches may be changed."""
    alone = {"max_tokens_min": 128, "tiers": ("deep",), "dwell_h": 1.0}
    ruled = Ruled(tuning=msgspec.structs.replace(TUNING, **alone))
    waited = []
    for _ in range(4):
        while not ruled.windows(replace(EASY, memory=0.9), 1):
            pass
        lowered = ruled.hour
        while not ruled.windows(EASY, 1):
            pass
        waited.append(ruled.hour - lowered)
    assert waited == [24, 48, 96, 192]


def test_after_each_turn_room_has_to_last_for_twice_as_many_windows_up_to_four_days() -> None:
    alone = {"max_tokens_min": 128, "tiers": ("deep",), "dwell_h": 0.1, "reverse_h": 0.1}
    ruled = Ruled(tuning=msgspec.structs.replace(TUNING, **alone))
    lasted = []
    for _ in range(6):
        while not ruled.windows(replace(EASY, memory=0.9), 1):
            pass
        lowered = ruled.hour
        while not ruled.windows(EASY, 1):
            pass
        lasted.append(ruled.hour - lowered)
    assert lasted == [6, 12, 24, 48, 96, 96]


def test_what_was_raised_is_taken_back_only_once_it_has_been_too_much_for_twice_as_long() -> None:
    alone = {"max_tokens_min": 128, "tiers": ("deep",), "batch_size_max": 32}
    ruled = Ruled(tuning=msgspec.structs.replace(TUNING, **alone))
    assert ruled.windows(EASY, 6) == [(Quantity.BATCH_SIZE, True)]
    assert ruled.windows(EASY, 12) == []
    assert ruled.windows(replace(EASY, memory=0.9), 3) == []
    assert ruled.windows(replace(EASY, memory=0.9), 1) == [(Quantity.BATCH_SIZE, False)]


def test_windows_in_a_row_are_counted_anew_after_every_choice() -> None:
    ruled = Ruled()
    assert len(ruled.windows(replace(EASY, memory=0.95), 3)) == 1
    assert len(ruled.windows(replace(EASY, memory=0.95), 1)) == 1


def test_nothing_is_asked_of_a_device_that_has_too_much_of_anything() -> None:
    """Its link is, and there is no cheaper way to send."""
    wide = msgspec.structs.replace(TUNING, batch_size_max=32)
    ruled = Ruled(tuning=wide, sampling="mean", codec=Codec.INT2)
    assert ruled.windows(replace(EASY, sending=0.9), 50) == []
    assert ruled.windows(EASY, 6) == [(Quantity.BATCH_SIZE, True)]


@pytest.mark.parametrize("sending, rises", [(0.19, True), (0.21, False)])
def test_a_richer_way_to_send_has_to_leave_the_margin_of_the_link(sending: float, rises: bool) -> None:
    """Eight segments are twice the bytes of four: .4 of .5 at most."""
    richer = msgspec.structs.replace(TUNING, richer=True)
    made = Ruled(tuning=richer).windows(replace(EASY, sending=sending), 6)
    assert made == ([(Quantity.RUNG, True)] if rises else [])


def test_what_was_raised_lately_stands_for_a_while_and_something_else_is_lowered() -> None:
    wide = msgspec.structs.replace(TUNING, batch_size_max=32)
    ruled = Ruled(tuning=wide)
    assert ruled.windows(EASY, 6) == [(Quantity.BATCH_SIZE, True)]
    assert ruled.windows(replace(EASY, memory=0.9), 2) == [(Quantity.MAX_TOKENS, False)]
    rising = ruled.windows(replace(EASY, memory=0.9), 9)
    assert (Quantity.BATCH_SIZE, False) not in rising
    later = ruled.windows(replace(EASY, memory=0.9), 6)
    assert (Quantity.BATCH_SIZE, False) in later


def test_only_so_many_choices_are_made_in_a_day() -> None:
    ruled = Ruled(tuning=msgspec.structs.replace(TUNING, changes_a_day=1))
    assert len(ruled.windows(replace(EASY, memory=0.99), 24)) == 1
    assert len(ruled.windows(replace(EASY, memory=0.99), 24)) == 1


@pytest.mark.parametrize("unknown", ["memory", "sending"])
def test_nothing_is_asked_for_that_raises_a_load_which_is_not_known(unknown: str) -> None:
    wide = msgspec.structs.replace(TUNING, batch_size_max=32, max_tokens_max=256, richer=True)
    made = Ruled(tuning=wide).windows(replace(EASY, **{unknown: None}), 100)  # type: ignore[arg-type]
    raised = {"memory": {Quantity.RUNG}, "sending": {Quantity.BATCH_SIZE}}[unknown]
    assert {what for what, _ in made} == raised


def test_a_board_without_a_thermometer_is_judged_by_the_rest() -> None:
    wide = msgspec.structs.replace(TUNING, max_tokens_max=256)
    assert Ruled(tuning=wide).windows(replace(EASY, celsius=None), 6) == [(Quantity.MAX_TOKENS, True)]


def test_a_device_that_does_nothing_is_not_judged() -> None:
    idle = Measured(samples=0, sample_s=None, memory=0.99, celsius=99.0, sending=1.0, outbox=1.0)
    assert Ruled().windows(idle, 20) == []


def test_a_deeper_tier_is_advised_where_it_answers_better_and_the_device_has_room() -> None:
    assert Ruled(tier="shallow").windows(EASY, 23) == []
    assert Ruled(tier="shallow").windows(EASY, 24) == [(Quantity.TIER, True)]
    assert Ruled(tier="shallow").windows(replace(EASY, memory=0.45), 48) == [], "twice the layers"


@pytest.mark.parametrize(
    "deep, shallow",
    [
        (Accuracy(0.81, 2000), Accuracy(0.8, 2000)),
        (Accuracy(0.85, 30), Accuracy(0.8, 30)),
        (Accuracy(0.7, 2000), Accuracy(0.8, 2000)),
        (None, Accuracy(0.8, 2000)),
    ],
    ids=["by a point", "by chance perhaps", "worse", "not measured"],
)
def test_a_deeper_tier_that_is_not_clearly_better_is_not_advised(
    deep: Accuracy | None, shallow: Accuracy
) -> None:
    governor = Ruled(tier="shallow").governor
    known = {"shallow": shallow, **({"deep": deep} if deep is not None else {})}
    for hour in range(60):
        assert governor.decide(EASY, START_UNIX_S + hour * HOUR_S, known) is None


def test_a_device_that_has_to_be_spared_is_not_advised_to_do_more() -> None:
    ruled = Ruled(tier="shallow")
    assert ruled.windows(replace(EASY, memory=0.9), 2) == [(Quantity.BATCH_SIZE, False)]
    assert ruled.windows(replace(EASY, memory=0.3), 100) == []
    fine = Ruled(tier="shallow")
    assert fine.windows(replace(EASY, memory=0.3), 24) == [(Quantity.TIER, True)]


def test_advice_is_taken_back_once_the_device_could_not_follow_it() -> None:
    ruled = Ruled(tier="shallow", tuning=msgspec.structs.replace(TUNING, dwell_h=1.0))
    assert ruled.windows(EASY, 24) == [(Quantity.TIER, True)]
    assert ruled.windows(replace(EASY, memory=0.45), 5) == []
    assert ruled.windows(replace(EASY, memory=0.45), 1) == [(Quantity.TIER, False)]
    assert ruled.governor.setting.advised == "shallow"


def test_advice_stands_for_two_dwells_at_least() -> None:
    ruled = Ruled(tier="shallow")
    assert ruled.windows(EASY, 24) == [(Quantity.TIER, True)]
    assert ruled.windows(replace(EASY, memory=0.45), 11) == []
    assert ruled.windows(replace(EASY, memory=0.45), 1) == [(Quantity.TIER, False)]


def test_only_tiers_that_are_named_are_advised() -> None:
    named = msgspec.structs.replace(TUNING, tiers=("shallow",))
    assert Ruled(tier="shallow", tuning=named).windows(EASY, 60) == []


@pytest.mark.parametrize("a_day", [1, 4])
def test_a_clock_that_was_ahead_holds_nothing_up_once_it_is_right(a_day: int) -> None:
    ruled = Ruled(tuning=msgspec.structs.replace(TUNING, changes_a_day=a_day))
    ruled.hour = 10_000
    assert ruled.windows(replace(EASY, memory=0.9), 2) == [(Quantity.BATCH_SIZE, False)]
    ruled.hour = 0
    ruled.governor = ruled.fresh()
    assert ruled.windows(EASY, 26) == [(Quantity.BATCH_SIZE, True)]


def test_what_lies_outside_other_bounds_is_brought_within_and_is_no_turn() -> None:
    ruled = Ruled(tuning=msgspec.structs.replace(TUNING, changes_a_day=1))
    assert ruled.governor.misfit() is None
    assert ruled.windows(replace(EASY, memory=0.9), 2) == [(Quantity.BATCH_SIZE, False)]
    ruled.governor.choices = choices("deep", msgspec.structs.replace(TUNING, batch_size_min=12))
    choice = ruled.governor.misfit()
    assert choice is not None and (choice.what, choice.setting.batch_size) == (Quantity.BOUNDS, 12)
    ruled.governor.apply(record_of(choice, "deep", "one", START_UNIX_S + ruled.hour * HOUR_S))
    assert ruled.governor.misfit() is None
    assert ruled.windows(EASY, 23) == []
    assert ruled.windows(EASY, 1) == [(Quantity.BATCH_SIZE, True)]


def test_other_bounds_are_not_counted_among_a_days_choices() -> None:
    ruled = Ruled(tuning=msgspec.structs.replace(TUNING, changes_a_day=1))
    narrow = choices("deep", msgspec.structs.replace(TUNING, batch_size_min=16))
    moved = Choice(what=Quantity.BOUNDS, up=False, setting=narrow.own, why="")
    ruled.governor.apply(record_of(moved, "deep", "one", START_UNIX_S))
    assert ruled.windows(replace(EASY, memory=0.9), 2) == [(Quantity.BATCH_SIZE, False)]


SHARES = st.none() | st.floats(0, 1)
WINDOWS = st.builds(
    Measured,
    samples=st.just(100),
    sample_s=st.none() | st.floats(0, 100),
    memory=SHARES,
    celsius=st.none() | st.floats(-20, 120),
    sending=SHARES,
    outbox=SHARES,
)
RUNS = st.lists(st.tuples(WINDOWS, st.integers(1, 30), st.integers(1, 12)), max_size=25)
WIDE = msgspec.structs.replace(TUNING, batch_size_max=64, max_tokens_max=512, richer=True, batch_size_min=1)


def _live(ruled: Ruled, runs: Sequence[tuple[Measured, int, int]]) -> None:
    for measured, by, times in runs:
        for _ in range(times):
            ruled.window(measured, by=by)


@settings(deadline=None, max_examples=60)
@given(RUNS, st.sampled_from(["deep", "shallow"]))
def test_whatever_is_measured_choices_keep_to_bounds_and_times(
    runs: list[tuple[Measured, int, int]], tier: str
) -> None:
    ruled = Ruled(tier=tier, tuning=WIDE)
    _live(ruled, runs)
    known = ruled.governor.choices
    hours = [(one.unix_s - START_UNIX_S) / HOUR_S for one in ruled.records]
    for place, record in enumerate(ruled.records):
        told = known.fitted(ruled.governor.setting)
        assert told == ruled.governor.setting
        assert known.bounds.why_not(told.assignment(run="ab" * 16, version=1, fence=1)) == ""
        assert record.advised in known.depths
        assert sum(hours[place] - 24 < hour for hour in hours[: place + 1]) <= WIDE.changes_a_day
    for what in Quantity:
        mine = [(hour, one.up) for hour, one in zip(hours, ruled.records, strict=True) if one.what is what]
        turns = 0
        for (before_h, before), (hour, up) in pairwise(mine):
            if up and before:
                assert hour - before_h >= WIDE.dwell_h
            elif up:
                assert hour - before_h >= WIDE.reverse_h * 2**turns
                turns += 1
            elif before:
                assert hour - before_h >= 2 * WIDE.dwell_h
        assert turns <= log2(1 + max(hours, default=0.0) / WIDE.reverse_h)


@settings(deadline=None, max_examples=40)
@given(RUNS, RUNS)
def test_a_governor_made_from_records_goes_on_as_the_one_that_made_them(
    before: list[tuple[Measured, int, int]], after: list[tuple[Measured, int, int]]
) -> None:
    ruled = Ruled(tuning=WIDE)
    _live(ruled, before)
    other = Ruled(tuning=WIDE)
    other.records, other.hour = list(ruled.records), ruled.hour
    other.governor = other.fresh()
    ruled.governor.forget_windows()
    _live(ruled, after)
    _live(other, after)
    assert other.records == ruled.records
