"""What page and scrape are shown: the whole fleet at first, then what changed, in bounded memory."""

from __future__ import annotations

import math
import threading
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from metrics.fleet_page.board import Board, Surroundings
from metrics.fleet_page.device_series import DeviceSeries
from metrics.fleet_page.events import MAX_REFUSALS
from metrics.fleet_page.fleet import Fleet
from metrics.fleet_page.history import History
from metrics.fleet_page.view import AssignedView, FleetView, Point, RefusalView, RefusedView, TrainerView
from sidestream.contract.messages import Status, Telemetry
from sidestream.contract.quality import Tally
from sidestream.contract.tasks import Task
from tests.until import PATIENCE_S
from tests.work import work

T0 = 1_700_000_000.0


class Crowd:
    """A fleet with a board, on a clock of its own."""

    def __init__(self, devices: int, *, most: int = 100) -> None:
        self.fleet = Fleet(["big", "small"], max_devices=most)
        self.board = Board("colours", unix_s=T0)
        self.now = 0.0
        self.assigned: dict[tuple[str, str], AssignedView] = {}
        for number in range(devices):
            self.status(number, "online")
            self.tell(number)

    def tier(self, number: int) -> str:
        return "big" if number % 2 else "small"

    def status(self, number: int, state: Literal["online", "offline"]) -> None:
        status = Status(state=state, birth=1, stream=f"{number:032x}", reason="lost")
        self.fleet.on_status(self.tier(number), f"d{number}", status, self.now)

    def tell(self, number: int, **figures: float | str) -> None:
        told = Telemetry(
            stream=f"{number:032x}",
            **{
                "accuracy": 0.5,
                "evaluation_samples": 10,
                "samples_read": 7,
                "samples_forwarded": 7,
                **figures,
            },  # type: ignore[arg-type]
        )
        self.fleet.on_telemetry(self.tier(number), f"d{number}", told, self.now)

    def update(self, trainer: TrainerView | None = None) -> None:
        self.board.update(
            self.fleet,
            self.fleet.summaries(self.now),
            trainer or TrainerView(connected=True, loss={"big": 1.5}),
            now=self.now,
            unix_s=T0 + self.now,
            around=Surroundings(assigned=lambda tier, name: self.assigned.get((tier, name))),
        )

    def refuse(self, number: int) -> None:
        self.board.refuse(
            RefusalView(at_unix_s=T0, tier="big", device=f"d{number}", kind="activations", reason="nonfinite")
        )


def _news(board: Board, seen: FleetView) -> FleetView:
    return board.view(board=seen.board, since=seen.revision)


def test_a_first_look_shows_every_device_and_tier() -> None:
    crowd = Crowd(5)
    crowd.update()
    view = crowd.board.view()
    assert view.whole and [device.name for device in view.devices] == [f"d{n}" for n in range(5)]
    assert [(tier.name, tier.states, tier.online) for tier in view.tiers] == [
        ("big", {"online": 2}, 2),
        ("small", {"online": 3}, 3),
    ]
    assert (view.fleet.samples, view.fleet.quality, view.fleet.evaluation_samples) == (35, 0.5, 50)
    assert view.fleet.loss == 1.5 and view.tiers[1].loss is None
    assert view.devices[0].heard_unix_s == T0


def test_a_later_look_shows_the_devices_that_changed_and_no_others() -> None:
    crowd = Crowd(5)
    crowd.update()
    seen = crowd.board.view()
    crowd.now = 1.0
    crowd.tell(3, samples_forwarded=9)
    crowd.update()
    news = _news(crowd.board, seen)
    assert not news.whole and [device.name for device in news.devices] == ["d3"]
    assert news.devices[0].samples == 9 and len(news.points) == 1
    assert _news(crowd.board, news).devices == ()


def chosen(since_unix_s: float, *, heeded: bool = False, advised: str = "") -> AssignedView:
    return AssignedView(
        words="batches of 8", why="memory is short", since_unix_s=since_unix_s, heeded=heeded, advised=advised
    )


def test_what_was_chosen_for_a_device_is_shown_at_once_and_is_an_event() -> None:
    """Whether or not the device has said anything since."""
    crowd = Crowd(2)
    crowd.update()
    seen = crowd.board.view()
    assert seen.devices[1].assigned is None
    crowd.assigned["big", "d1"] = chosen(T0)
    crowd.update()
    seen = _news(crowd.board, seen)
    assert [(device.name, device.assigned) for device in seen.devices] == [("d1", chosen(T0))]
    assert [(one.kind, one.words) for one in seen.events] == [("assigned", "batches of 8: memory is short")]
    crowd.assigned["big", "d1"] = chosen(T0, heeded=True)
    crowd.update()
    seen = _news(crowd.board, seen)
    assert [device.assigned for device in seen.devices] == [chosen(T0, heeded=True)] and seen.events == ()
    crowd.assigned["big", "d1"] = chosen(T0 + 9, advised="small")
    crowd.update()
    [event] = _news(crowd.board, seen).events
    assert event.words == "batches of 8; tier small is advised: memory is short"


def test_what_was_chosen_before_a_trainers_start_is_no_news_of_the_fleets() -> None:
    crowd = Crowd(2)
    crowd.assigned["big", "d1"] = chosen(T0)
    crowd.update()
    assert "assigned" not in {event.kind for event in crowd.board.view().events}
    assert "assigned" in {event.kind for event in crowd.board.detail("big", "d1").events}


def test_a_device_that_falls_silent_is_news() -> None:
    crowd = Crowd(2)
    crowd.update()
    seen = crowd.board.view()
    crowd.now = 121.0
    crowd.update()
    assert {device.state for device in _news(crowd.board, seen).devices} == {"silent"}


def test_whoever_saw_another_board_or_a_device_that_is_gone_gets_everything() -> None:
    crowd = Crowd(3)
    crowd.update()
    seen = crowd.board.view()
    assert crowd.board.view(board="another", since=seen.revision).whole
    assert crowd.board.view(board=seen.board, since=seen.revision + 5).whole
    crowd.fleet.forget("big", "d1")
    crowd.update()
    news = _news(crowd.board, seen)
    assert news.whole and [device.name for device in news.devices] == ["d0", "d2"]


def test_refusals_are_shown_newest_first_while_they_are_news_and_only_so_many() -> None:
    crowd = Crowd(1)
    for number in range(MAX_REFUSALS + 5):
        crowd.refuse(number)
    crowd.update(TrainerView(refused=(RefusedView(kind="activations", reason="nonfinite", count=55),)))
    view = crowd.board.view()
    assert view.refusals is not None and len(view.refusals) == MAX_REFUSALS
    assert view.refusals[0].device == f"d{MAX_REFUSALS + 4}"
    assert view.points[-1].refused == 55
    assert _news(crowd.board, view).refusals is None


def test_a_view_is_json_and_back() -> None:
    crowd = Crowd(2)
    crowd.refuse(1)
    crowd.update()
    view = crowd.board.view()
    assert msgspec.json.decode(msgspec.json.encode(view), type=FleetView) == view


@given(st.lists(st.floats(0.1, 5000), min_size=1, max_size=300))
def test_a_history_of_any_length_is_bounded_ascends_and_keeps_its_end(steps: list[float]) -> None:
    history, at = History(most=16, recent=()), T0
    for revision, step in enumerate(steps, start=1):
        at += step
        history.add(Point(at_unix_s=at, revision=revision))
    times = [point.at_unix_s for point in history.points]
    assert 1 <= len(times) < 16 and times == sorted(times)
    assert at - times[-1] <= 5000 + 300 * 5000 / 8


def test_the_last_minutes_stay_close_together_whatever_has_become_of_the_whole_run() -> None:
    history = History(most=16, recent=((1.0, 20), (5.0, 20)))
    for second in range(1000):
        history.add(Point(at_unix_s=T0 + second, revision=second))
    ages = [round(T0 + 999 - point.at_unix_s) for point in history.points]
    assert ages == sorted(ages, reverse=True) and len(ages) == len(set(ages)) <= 16 + 20 + 20
    assert ages[-20:] == list(range(19, -1, -1)) and ages[0] > 900
    assert all(age in ages for age in (24, 49, 99)), "and the minutes before five seconds apart"


def test_a_clock_that_is_put_back_begins_the_curves_anew() -> None:
    history = History()
    for at in (T0, T0 + 5, T0 - 3600):
        history.add(Point(at_unix_s=at, revision=1))
    assert [point.at_unix_s for point in history.points] == [T0 - 3600]


def test_as_many_devices_as_allowed_have_series_of_their_own() -> None:
    crowd, registry = Crowd(5), CollectorRegistry()
    registry.register(DeviceSeries(crowd.board, 3))
    crowd.update()
    text = generate_latest(registry).decode()
    assert text.count('sidestream_one_device_online{device="') == 3
    assert 'sidestream_one_device_samples{device="d0",tier="small"} 7.0' in text
    assert registry.get_sample_value("sidestream_devices_unlisted") == 2


def test_none_have_where_that_is_switched_off() -> None:
    crowd, registry = Crowd(2), CollectorRegistry()
    registry.register(DeviceSeries(crowd.board, 0))
    crowd.update()
    assert "one_device" not in generate_latest(registry).decode()


def test_a_device_that_never_measured_has_no_quality_series() -> None:
    crowd, registry = Crowd(0), CollectorRegistry()
    crowd.status(1, "online")
    registry.register(DeviceSeries(crowd.board, 10))
    crowd.update()
    text = generate_latest(registry).decode()
    assert "sidestream_one_device_quality{" not in text and "sidestream_one_device_online{" in text


def test_a_device_in_quarantine_is_shown_so_whatever_it_is_up_to() -> None:
    crowd = Crowd(3)
    crowd.update()
    seen = crowd.board.view()
    crowd.board.update(
        crowd.fleet,
        crowd.fleet.summaries(0.0),
        TrainerView(),
        now=0.0,
        unix_s=T0,
        around=Surroundings(held={"d1": "odd sizes"}.get),
    )
    news = _news(crowd.board, seen)
    assert [(device.name, device.state, device.online) for device in news.devices] == [
        ("d1", "quarantined", True)
    ]
    assert news.tiers[0].states == {"quarantined": 1}


def test_a_job_of_another_task_is_shown_by_the_measure_that_it_is_judged_by() -> None:
    fleet, board = Fleet(["big"]), Board("story", unix_s=T0, task=Task.CAUSAL_LM)
    for number, nll in enumerate((10.0, 30.0)):
        told = Telemetry(
            stream=f"{number:032x}",
            accuracy=0.1,
            evaluation_samples=10,
            tally=Tally(units=10, correct=1, nll=nll),
        )
        born = Status(state="online", birth=1, stream=f"{number:032x}")
        fleet.on_status("big", f"d{number}", born, 0.0)
        fleet.on_telemetry("big", f"d{number}", told, 0.0)
    board.update(fleet, fleet.summaries(0.0), TrainerView(), now=0.0, unix_s=T0)
    view = board.view()
    assert view.measure == "perplexity"
    assert [device.quality for device in view.devices] == [round(math.e, 4), round(math.e**3, 4)]
    assert view.fleet.quality == view.tiers[0].quality == pytest.approx(math.e**2), (
        "counts add up, ratios do not"
    )


def test_devices_that_count_nothing_have_no_quality_where_accuracy_is_not_it() -> None:
    fleet, board = Fleet(["big"]), Board("numbers", unix_s=T0, task=Task.REGRESSION)
    fleet.on_telemetry("big", "d", Telemetry(stream="a" * 32, accuracy=0.5, evaluation_samples=3), 0.0)
    board.update(fleet, fleet.summaries(0.0), TrainerView(), now=0.0, unix_s=T0)
    assert board.view().devices[0].quality is None and board.view().fleet.quality is None


def test_whoever_looks_does_not_wait_while_an_update_is_worked_out() -> None:
    crowd = Crowd(2)
    crowd.update()
    seen: list[FleetView] = []

    def looked_at(tier: str, name: str) -> None:
        looking = threading.Thread(target=lambda: seen.append(crowd.board.view()), daemon=True)
        looking.start()
        looking.join(PATIENCE_S)

    around = Surroundings(assigned=looked_at)
    crowd.board.update(
        crowd.fleet, crowd.fleet.summaries(0.0), TrainerView(), now=0, unix_s=T0, around=around
    )
    assert [view.revision for view in seen] == [1, 1] and crowd.board.view().revision == 2


def test_a_device_of_which_nothing_is_heard_costs_an_update_little() -> None:
    few, many = Crowd(50), Crowd(100)
    few.update()
    many.update()
    assert work(many.update) - work(few.update) < 50 * 600, "of bytecode"
