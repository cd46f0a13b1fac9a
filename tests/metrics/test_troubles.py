"""What is the matter with a device is told in words, the worst first; and what happened, with times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from metrics.fleet_page.board import Surroundings
from metrics.fleet_page.events import MAX_EVENTS, OF_A_DEVICE, EventLog
from metrics.fleet_page.fleet import Fleet
from metrics.fleet_page.troubles import SEVERE, TITLES
from metrics.fleet_page.versions import VersionTimes
from metrics.fleet_page.view import DeviceView, EventView, RefusalView, TrainerView
from sidestream.contract.messages import Status, Telemetry
from sidestream.contract.quality import Tally, tally_labels
from tests.metrics.test_board import T0, Crowd

DAY_S = 86_400.0


def shown(crowd: Crowd, name: str = "d1") -> DeviceView:
    crowd.update()
    return next(one for one in crowd.board.view().devices if one.name == name)


def kinds(crowd: Crowd, name: str = "d1") -> list[str]:
    return [one.kind for one in shown(crowd, name).troubles]


def words(crowd: Crowd, kind: str) -> str:
    return next(one.words for one in shown(crowd).troubles if one.kind == kind)


@pytest.mark.parametrize(
    ("figures", "kind", "says"),
    [
        (
            {"samples_read": 10, "samples_skipped": 8, "skipped_label": 8},
            "labels",
            "8 of the 10 samples read",
        ),
        (
            {"samples_read": 10, "samples_broken": 4, "skipped_empty": 1},
            "unusable",
            "4 unreadable, 1 without a text",
        ),
        ({"samples_forwarded": 0, "finished": True}, "no-data", "it has read no sample"),
        (
            {"samples_read": 7, "outbox_bytes": 90, "outbox_max_bytes": 100},
            "outbox",
            "its outbox is 90% full",
        ),
        ({"samples_read": 7, "samples_dropped": 5}, "outbox", "dropped 5 samples"),
        ({"samples_read": 7, "receipt_s": 43.0, "outbox_batches": 9}, "link", "43 s to be receipted; 9 wait"),
        ({"samples_read": 7, "temperature_celsius": 85.4}, "hot", "it is at 85 °C"),
        ({"samples_read": 7, "unix_s": T0 + 7200}, "clock", "its clock is 2 hours ahead"),
        ({"samples_read": 7, "unix_s": T0 - 3 * DAY_S}, "clock", "its clock is 3 days behind"),
        ({"trouble": "waits for the plan"}, "waiting", "waits for the plan"),
    ],
)
def test_what_a_device_says_is_told_as_trouble(figures: dict[str, Any], kind: str, says: str) -> None:
    crowd = Crowd(1)
    crowd.status(1, "online")
    crowd.now = 20.0
    told = Telemetry(stream=f"{1:032x}", **figures)
    crowd.fleet.on_telemetry("big", "d1", told, crowd.now, unix_s=T0)
    assert kinds(crowd) == [kind]
    assert says in words(crowd, kind)


@pytest.mark.parametrize(
    "figures",
    [
        {"samples_read": 7, "receipt_s": 43.0},
        {"samples_read": 7, "receipt_s": 9.0, "outbox_batches": 9},
        {"samples_read": 7, "temperature_celsius": 79.0},
        {"samples_read": 7, "unix_s": T0 + 50},
        {"trouble": "waits for the plan, as anybody does who has just come"},
        {"samples_read": 7, "outbox_bytes": 70, "outbox_max_bytes": 100},
        {},
    ],
)
def test_a_device_that_is_well_has_none(figures: dict[str, Any]) -> None:
    crowd = Crowd(1)
    crowd.status(1, "online")
    told = Telemetry(stream=f"{1:032x}", **figures)
    crowd.fleet.on_telemetry("big", "d1", told, crowd.now, unix_s=T0)
    assert kinds(crowd) == []


def test_a_device_that_reads_nothing_for_a_minute_has_no_data() -> None:
    crowd = Crowd(0)
    crowd.status(1, "online")
    crowd.now = 70.0
    crowd.tell(1, samples_read=0, samples_forwarded=0)
    assert kinds(crowd) == ["no-data"]


def test_what_a_device_waited_for_before_it_read_is_no_lack_of_data() -> None:
    crowd = Crowd(0)
    crowd.status(1, "online")
    crowd.now = 70.0
    crowd.tell(1, samples_read=0, samples_forwarded=0, trouble="waits until its backbone is loaded")
    assert kinds(crowd) == ["waiting"]
    crowd.now = 75.0
    crowd.tell(1, samples_read=0, samples_forwarded=0)
    assert kinds(crowd) == []
    crowd.now = 135.0
    crowd.tell(1, samples_read=0, samples_forwarded=0)
    assert kinds(crowd) == ["no-data"]


def test_who_ended_with_an_error_is_not_said_to_lack_data_too() -> None:
    crowd = Crowd(0)
    crowd.now = 70.0
    crowd.tell(1, samples_read=0, samples_forwarded=0)
    ended = Status(state="offline", birth=1, stream=f"{1:032x}", reason="other weights")
    crowd.fleet.on_status("big", "d1", ended, crowd.now)
    assert kinds(crowd) == ["failed"]


def test_a_device_that_died_is_absent_or_failed_and_says_since_when() -> None:
    crowd = Crowd(4)
    crowd.now = 30.0
    crowd.status(1, "offline")
    crowd.fleet.on_status(
        "big", "d3", Status(state="offline", birth=1, stream=f"{3:032x}", reason="data.path: gone"), crowd.now
    )
    crowd.now = 100.0
    [absent] = shown(crowd).troubles
    assert (absent.kind, absent.since_unix_s, absent.severe) == ("absent", T0 + 30, True)
    [failed] = shown(crowd, "d3").troubles
    assert failed.kind == "failed" and failed.words.endswith("data.path: gone")
    crowd.now = 300.0
    assert kinds(crowd, "d0") == ["absent"], "silent for too long"


def test_a_certificate_that_has_ended_or_ends_soon_is_told_of_also_of_a_device_that_is_lost() -> None:
    crowd = Crowd(0)
    for left_days, expected in ((20, []), (13, ["expiring"]), (-1, ["certificate"])):
        born = Status(
            state="online", birth=1, stream=f"{1:032x}", certificate_expires_unix_s=T0 + left_days * DAY_S
        )
        crowd.fleet.on_status("big", "d1", born, crowd.now)
        crowd.now += 1
        assert kinds(crowd) == expected
    assert "expired on 2023-11-13" in words(crowd, "certificate")
    gone = Status(
        state="offline", birth=1, stream=f"{1:032x}", certificate_expires_unix_s=T0 - 1, reason="lost"
    )
    crowd.fleet.on_status("big", "d1", gone, crowd.now)
    assert kinds(crowd) == ["certificate", "absent"]


def test_another_backbone_than_the_tiers_and_a_quarantine_are_told_with_their_reasons() -> None:
    crowd = Crowd(2)
    born = Status(state="online", birth=2, stream=f"{1:032x}", fingerprint="ab" * 16)
    crowd.fleet.on_status("big", "d1", born, 0.0)
    around = Surroundings(held={"d1": "odd sizes"}.get, fingerprints={"big": "cd" * 16})
    summaries = crowd.fleet.summaries(0.0)
    crowd.board.update(crowd.fleet, summaries, TrainerView(), now=0.0, unix_s=T0, around=around)
    view = next(one for one in crowd.board.view().devices if one.name == "d1")
    assert view.state == "quarantined" and [one.kind for one in view.troubles] == ["quarantined", "weights"]
    assert "odd sizes" in view.troubles[0].words and "abababab" in view.troubles[1].words


def test_a_refused_message_is_trouble_for_ten_minutes() -> None:
    crowd = Crowd(2)
    crowd.update()
    crowd.refuse(1)
    assert kinds(crowd) == ["refused"]
    crowd.now = 700.0
    for number in range(2):
        crowd.tell(number)
    assert kinds(crowd) == []


def test_what_is_sent_and_does_not_arrive_is_told() -> None:
    crowd = Crowd(2)
    crowd.fleet.set_undelivered("big", "d1", "says that it sends batches, and none has come")
    assert kinds(crowd) == ["undelivered"]


def test_old_weights_are_told_of_once_a_newer_version_has_been_out_for_long() -> None:
    crowd = Crowd(2)
    for now, expected in ((0.0, []), (890.0, []), (910.0, ["behind"])):
        crowd.now = now
        crowd.tell(1, weights_version=5)
        crowd.update(TrainerView(published=5 if now == 0 else 9))
        crowd.now = now + 1
        crowd.tell(1, weights_version=5)
        crowd.update(TrainerView(published=9))
        view = next(one for one in crowd.board.view().devices if one.name == "d1")
        assert [one.kind for one in view.troubles] == expected


def test_a_device_that_wants_finished_versions_is_behind_only_when_there_is_a_newer_one() -> None:
    crowd = Crowd(2)
    for now, finished, expected in ((0.0, 5, []), (1000.0, 5, []), (2000.0, 8, []), (2910.0, 8, ["behind"])):
        crowd.now = now
        crowd.tell(1, weights_version=5, final_only=True)
        crowd.update(TrainerView(published=9, finished=finished))
        crowd.now = now + 1
        crowd.tell(1, weights_version=5, final_only=True)
        crowd.update(TrainerView(published=9, finished=finished))
        view = next(one for one in crowd.board.view().devices if one.name == "d1")
        assert view.final_only and [one.kind for one in view.troubles] == expected


def test_a_version_is_outdated_since_the_next_one() -> None:
    times = VersionTimes()
    times.note(3, 0.0)
    times.note(7, 10.0)
    times.note(9, 20.0)
    assert [times.outdated_s(version, 30.0) for version in (None, 3, 7, 9, 12)] == [0.0, 20.0, 10.0, 0.0, 0.0]


def test_a_trouble_keeps_its_time_while_it_lasts_and_its_end_is_an_event() -> None:
    crowd = Crowd(2)
    for now in (0.0, 50.0):
        crowd.now = now
        crowd.tell(1, samples_read=7, temperature_celsius=90 + now / 50)
        [hot] = shown(crowd).troubles
        assert hot.since_unix_s == T0
    crowd.now = 60.0
    crowd.tell(1, samples_read=7)
    assert shown(crowd).troubles == ()
    told = [one.words for one in crowd.board.detail("big", "d1").events]
    assert told == ["no longer: Too hot", "Too hot: it is at 90 °C", "is online"]


def test_events_of_the_fleet_are_news_once_and_what_is_minor_stays_with_its_device() -> None:
    crowd = Crowd(2)
    crowd.update()
    seen = crowd.board.view()
    assert {one.words for one in seen.events} == {"is online", "has its broker"}
    crowd.now = 1.0
    crowd.tell(1, weights_version=4)
    crowd.status(0, "offline")
    crowd.update()
    news = crowd.board.view(board=seen.board, since=seen.revision)
    assert [(one.device, one.kind) for one in news.events] == [("d0", "state"), ("d0", "absent")]
    assert crowd.board.detail("big", "d1").events[0].words == "uses version 4"
    assert crowd.board.detail("big", "nobody").device is None


def test_the_log_is_bounded_and_what_repeats_is_one_event_with_a_count() -> None:
    log = EventLog()
    for number in range(MAX_EVENTS + 50):
        log.note(EventView(at_unix_s=number, kind="state", words=str(number), tier="t", device="d"))
    assert len(log.since(-1)) == MAX_EVENTS and len(log.of("t", "d")) == OF_A_DEVICE
    for number in range(5):
        refusal = RefusalView(at_unix_s=number, tier="t", device="d", kind="activations", reason="NaN")
        log.refuse(refusal, number, known=True)
    assert (log.of("t", "d")[0].count, log.of("t", "d")[0].at_unix_s) == (5, 4.0)
    log.forget("t", "d")
    assert log.of("t", "d") == () and log.last_refusal("t", "d") is None


def test_a_stranger_that_is_refused_is_kept_nowhere_but_in_the_fleets_list() -> None:
    log = EventLog()
    for number in range(5):
        refusal = RefusalView(at_unix_s=0, tier="t", device=str(number), kind="status", reason="junk")
        log.refuse(refusal, number, known=False)
    assert log.of("t", "0") == () and len(log.since(-1)) == 5


def test_labels_are_shown_with_the_pairs_most_confused_and_only_when_they_change() -> None:
    fleet, crowd = Fleet(["pi"]), Crowd(0)
    tally = tally_labels(np.array([0, 1, 1, 1]), np.array([0, 0, 0, 1]), 2)
    fleet.on_status("pi", "d", Status(state="online", birth=1, stream="a" * 32), 0.0)
    fleet.on_telemetry("pi", "d", Telemetry(stream="a" * 32, tally=tally), 0.0)
    for _ in range(2):
        around = Surroundings(labels=("cat", "dog"))
        crowd.board.update(fleet, fleet.summaries(0.0), TrainerView(), now=0.0, unix_s=T0, around=around)
    view = crowd.board.view()
    assert view.labels is not None
    assert [(one.name, one.actual, one.answered, one.right) for one in view.labels.labels] == [
        ("cat", 3, 1, 1),
        ("dog", 1, 3, 1),
    ]
    assert [(one.actual, one.answered, one.count) for one in view.labels.confused] == [("cat", "dog", 2)]
    assert crowd.board.view(board=view.board, since=1).labels is None
    around = Surroundings(labels=("only one",))
    crowd.board.update(fleet, fleet.summaries(0.0), TrainerView(), now=0.0, unix_s=T0, around=around)
    assert crowd.board.view().labels is None, "a tally of other labels is not shown under the job's names"
    assert Tally().by_label() == []


def test_every_severe_kind_has_a_title() -> None:
    assert set(TITLES) >= SEVERE
