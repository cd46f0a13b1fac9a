"""The trainer's view of its devices: who is there, what they said last, what they did in all."""

from __future__ import annotations

import random
from typing import Any, Literal

import pytest

from metrics.fleet_page.fleet import Device, Fleet, State
from sidestream.contract.errors import MismatchError
from sidestream.contract.messages import Status, Telemetry

A, B = "a" * 32, "b" * 32


def _status(state: Literal["online", "offline"], birth: int, stream: str = A) -> Status:
    return Status(state=state, birth=birth, stream=stream)


def _told(stream: str = A, **values: Any) -> Telemetry:
    return Telemetry(stream=stream, **values)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(["pi", "jetson"])


def test_a_birth_brings_a_device_online_and_its_will_takes_it_away(fleet: Fleet) -> None:
    assert fleet.on_status("pi", "d", _status("online", 1), 0)
    assert fleet.summary(1, "pi").devices_online == 1
    assert fleet.on_status("pi", "d", _status("offline", 1), 2)
    assert (fleet.summary(2, "pi").devices_online, fleet.summary(2, "pi").devices_known) == (0, 1)


def test_a_late_will_of_an_older_connection_is_ignored(fleet: Fleet) -> None:
    fleet.on_status("pi", "d", _status("online", 1), 0)
    fleet.on_status("pi", "d", _status("online", 2), 1)
    assert not fleet.on_status("pi", "d", _status("offline", 1), 2)
    assert fleet.summary(2).devices_online == 1
    assert fleet.on_status("pi", "d", _status("offline", 2), 3)
    assert fleet.summary(3).devices_online == 0


def test_a_late_birth_does_not_revive_a_device(fleet: Fleet) -> None:
    fleet.on_status("pi", "d", _status("offline", 5), 0)
    assert not fleet.on_status("pi", "d", _status("online", 4), 1)
    assert fleet.summary(1).devices_online == 0


def test_a_reset_device_counts_births_from_one_again(fleet: Fleet) -> None:
    fleet.on_status("pi", "d", _status("online", 57, A), 0)
    assert fleet.on_status("pi", "d", _status("online", 1, B), 1)
    assert not fleet.on_status("pi", "d", _status("offline", 57, A), 2), "the old life's will"
    assert fleet.summary(2).devices_online == 1
    assert fleet.on_status("pi", "d", _status("offline", 1, B), 3)


def test_a_silent_device_is_not_online_until_it_speaks(fleet: Fleet) -> None:
    fleet.on_status("pi", "d", _status("online", 1), 0)
    assert fleet.summary(121).devices_online == 0
    fleet.on_telemetry("pi", "d", _told(), 122)
    assert fleet.summary(123).devices_online == 1


def test_telemetry_alone_makes_a_device_known_not_online(fleet: Fleet) -> None:
    fleet.on_telemetry("pi", "d", _told(samples_read=3), 0)
    summary = fleet.summary(0, "pi")
    assert (summary.devices_known, summary.devices_online, summary.counts["samples_read"]) == (1, 0, 3)


def test_counters_add_up_over_devices_and_are_counted_once(fleet: Fleet) -> None:
    for _ in range(3):
        fleet.on_telemetry("pi", "d", _told(A, samples_forwarded=10, forward_seconds=0.5), 0)
    fleet.on_telemetry("pi", "d", _told(A, samples_forwarded=12, forward_seconds=0.75), 1)
    fleet.on_telemetry("jetson", "e", _told(B, samples_forwarded=5), 1)
    assert fleet.summary(1, "pi").counts["samples_forwarded"] == 12
    assert fleet.summary(1, "pi").counts["forward_seconds"] == 0.75
    assert fleet.summary(1).counts["samples_forwarded"] == 17


def test_a_new_outbox_starts_from_zero_and_the_sum_goes_on(fleet: Fleet) -> None:
    fleet.on_telemetry("pi", "d", _told(A, bytes_up=100), 0)
    fleet.on_telemetry("pi", "d", _told(B, bytes_up=7), 1)
    assert fleet.summary(1).counts["bytes_up"] == 107


def test_two_machines_under_one_name_are_counted_once_each(fleet: Fleet) -> None:
    for now in range(10):
        fleet.on_telemetry("pi", "d", _told(A, samples_read=100 + now), now)
        fleet.on_telemetry("pi", "d", _told(B, samples_read=200 + now), now)
    assert fleet.summary(9).counts["samples_read"] == 109 + 209


def test_a_sum_never_falls(fleet: Fleet) -> None:
    fleet.on_telemetry("pi", "d", _told(samples_read=100), 0)
    fleet.on_telemetry("pi", "d", _told(samples_read=90), 1)
    assert fleet.summary(1).counts["samples_read"] == 100
    fleet.on_telemetry("pi", "d", _told(samples_read=101), 2)
    assert fleet.summary(2).counts["samples_read"] == 101


def test_a_summary_is_a_snapshot(fleet: Fleet) -> None:
    before = fleet.summary(0)
    fleet.on_telemetry("pi", "d", _told(samples_read=1), 0)
    assert before.counts["samples_read"] == 0


def test_a_probes_accuracy_is_weighted_by_evaluation_samples_of_those_that_have_one(fleet: Fleet) -> None:
    assert fleet.summary(0, "pi").probe_accuracy is None
    for name, probe, samples in (("d", 1.0, 30), ("e", 0.5, 10), ("new", None, 50)):
        fleet.on_status("pi", name, _status("online", 1), 0)
        fleet.on_telemetry("pi", name, _told(probe_accuracy=probe, evaluation_samples=samples), 0)
    assert fleet.summary(0, "pi").probe_accuracy == 0.875


def test_accuracy_is_weighted_by_evaluation_samples_of_online_devices(fleet: Fleet) -> None:
    assert fleet.summary(0, "pi").accuracy is None
    for name, accuracy, samples in (("d", 1.0, 30), ("e", 0.5, 10), ("gone", 0.0, 1000), ("new", None, 0)):
        if name != "gone":
            fleet.on_status("pi", name, _status("online", 1), 0)
        fleet.on_telemetry("pi", name, _told(accuracy=accuracy, evaluation_samples=samples), 0)
    summary = fleet.summary(0, "pi")
    assert (summary.accuracy, summary.evaluation_samples) == (0.875, 40)


@pytest.mark.parametrize(("reason", "counts"), [("goodbye", True), ("lost", False)])
def test_a_device_that_left_when_all_was_done_is_still_measured_by(
    fleet: Fleet, reason: str, counts: bool
) -> None:
    fleet.on_status("pi", "d", _status("online", 1), 0)
    told = _told(finished=True, accuracy=0.75, evaluation_samples=10, weights_version=31)
    fleet.on_telemetry("pi", "d", told, 0)
    fleet.on_status("pi", "d", Status(state="offline", birth=1, stream=A, reason=reason), 1)
    summary = fleet.summary(2, "pi")
    assert summary.accuracy == (0.75 if counts else None)
    assert summary.version_max == (31 if counts else None) and summary.version_min is None


def test_what_a_quarantined_device_measures_counts_for_nothing(fleet: Fleet) -> None:
    for name, accuracy in (("a", 0.9), ("b", 0.1)):
        fleet.on_status("pi", name, _status("online", 1), 0)
        fleet.on_telemetry("pi", name, _told(accuracy=accuracy, evaluation_samples=10), 0)
    fleet.held = lambda device: device == "b"
    summary = fleet.summary(1, "pi")
    assert summary.accuracy == pytest.approx(0.9) and summary.evaluation_samples == 10


def test_a_tier_is_summed_up(fleet: Fleet) -> None:
    for name, version, finished in (("d", 3, False), ("e", 9, True)):
        fleet.on_status("pi", name, _status("online", 1), 0)
        told = _told(
            weights_version=version,
            finished=finished,
            outbox_batches=2,
            outbox_bytes=50,
            unlabelled_waiting=version,
            peak_rss_bytes=version * 100,
            temperature_celsius=40.0 + version,
        )
        fleet.on_telemetry("pi", name, told, 0)
    fleet.on_telemetry("pi", "gone", _told(outbox_bytes=7, weights_version=1, temperature_celsius=90.0), 0)
    summary = fleet.summary(0, "pi")
    assert (summary.devices_known, summary.devices_online, summary.devices_finished) == (3, 2, 1)
    assert (summary.version_min, summary.version_max) == (3, 9)
    assert (summary.outbox_batches, summary.outbox_bytes) == (4, 107), "an offline device keeps its outbox"
    assert summary.unlabelled_waiting == 12
    assert (summary.peak_rss_bytes, summary.temperature_celsius) == (900, 49.0)


def test_every_tier_has_a_summary_and_no_other_tier_gets_one(fleet: Fleet) -> None:
    assert list(fleet.summaries(0)) == ["jetson", "pi"]
    with pytest.raises(MismatchError, match="no tier 'toaster'"):
        fleet.on_telemetry("toaster", "d", _told(), 0)
    with pytest.raises(MismatchError):
        fleet.on_status("toaster", "d", _status("online", 1), 0)
    assert fleet.summary(0).devices_known == 0


def test_a_full_view_forgets_the_longest_silent_offline_device_and_keeps_its_counts() -> None:
    fleet = Fleet(["pi"], max_devices=3)
    fleet.on_status("pi", "online", _status("online", 1), 0)
    for now, name in enumerate(("old", "newer", "newest"), start=1):
        fleet.on_telemetry("pi", name, _told(f"{now:032x}", samples_read=10), now)
    assert [device.name for device in fleet.devices("pi")] == ["newer", "newest", "online"]
    assert fleet.summary(4).counts["samples_read"] == 30
    fleet.on_telemetry("pi", "old", _told(f"{1:032x}", samples_read=11), 5)
    assert fleet.summary(5).counts["samples_read"] == 31, "and does not count it again when it comes back"


def test_a_crowd_of_invented_devices_stays_within_the_bound() -> None:
    fleet = Fleet(["pi"], max_devices=10)
    for number in range(200):
        fleet.on_telemetry("pi", f"d{number}", _told(f"{number:032x}", samples_read=1), number)
    assert len(fleet.devices()) == 10
    assert fleet.summary(200).counts["samples_read"] == 200


def test_a_state_says_how_a_device_left(fleet: Fleet) -> None:
    def off(birth: int, reason: str) -> Status:
        return Status(state="offline", birth=birth, stream=A, reason=reason)

    fleet.on_status("pi", "d", _status("online", 1), 0)
    device = fleet.devices()[0]
    assert fleet.state(device, 1) is State.ONLINE
    assert fleet.state(device, 121) is State.SILENT
    fleet.on_status("pi", "d", off(1, "lost"), 122)
    assert fleet.state(device, 123) is State.LOST and fleet.summary(123).devices_lost == 1
    fleet.on_status("pi", "d", _status("online", 2), 124)
    fleet.on_status("pi", "d", off(2, "goodbye"), 125)
    assert fleet.state(device, 126) is State.GONE and fleet.summary(126).devices_lost == 0
    fleet.on_telemetry("pi", "d", _told(finished=True), 127)
    assert fleet.state(device, 1000) is State.FINISHED and fleet.summary(1000).devices_lost == 0
    fleet.on_status("pi", "d", _status("online", 3), 1001)
    assert fleet.state(device, 1002) is State.FINISHED
    assert fleet.state(device, 1200) is State.SILENT and fleet.summary(1200).devices_lost == 1
    fleet.on_status("pi", "d", off(3, "lost"), 1201)
    assert fleet.state(device, 1202) is State.LOST and fleet.summary(1202).devices_lost == 1


def test_a_forgotten_device_is_off_the_list_and_its_sums_stay(fleet: Fleet) -> None:
    fleet.on_telemetry("pi", "d", _told(samples_read=3), 0)
    assert fleet.forget("pi", "d") and not fleet.forget("pi", "d")
    assert (fleet.summary(1).devices_known, fleet.summary(1).counts["samples_read"]) == (0, 3)


def test_the_fullest_outbox_counts_and_one_of_unknown_size_does_not(fleet: Fleet) -> None:
    fleet.on_telemetry("pi", "d", _told(outbox_bytes=50, outbox_max_bytes=200), 0)
    fleet.on_telemetry("pi", "e", _told(outbox_bytes=150, outbox_max_bytes=200), 0)
    fleet.on_telemetry("pi", "old", _told(outbox_bytes=10**9), 0)
    assert fleet.summary(0, "pi").outbox_fill == 0.75
    fleet.on_telemetry("pi", "e", _told(outbox_bytes=201, outbox_max_bytes=200), 1)
    assert fleet.summary(1, "pi").outbox_fill == 1.0, "the cap may be passed by one batch"


def test_a_message_costs_the_same_in_a_fleet_that_is_over_its_limit() -> None:
    looked_at = 0

    class Counted(Fleet):
        def online(self, device: Device, now: float) -> bool:
            nonlocal looked_at
            looked_at += 1
            return super().online(device, now)

    fleet = Counted(["pi"], max_devices=1000)
    for index in range(3000):
        fleet.on_telemetry("pi", f"d{index}", Telemetry(stream="0" * 32), float(index))
    assert len(list(fleet.by_age())) == 1000
    assert looked_at <= 2 * 2000


@pytest.mark.parametrize("seed", range(20))
def test_whoever_is_forgotten_was_not_online_and_was_heard_longest_ago(seed: int) -> None:
    rng, now = random.Random(seed), 0.0
    fleet = Fleet(["pi"], max_devices=8, silent_after_s=10.0)
    for step in range(400):
        now += rng.uniform(0.0, 3.0)
        name = f"d{rng.randrange(30)}"
        before = {entry.name: (fleet.online(entry, now), entry.heard) for entry in fleet.by_age()}
        if rng.random() < 0.3:
            fleet.on_telemetry("pi", name, Telemetry(stream="0" * 32), now)
        else:
            state = rng.choice(["online", "offline"])
            status = Status(state=state, birth=step, stream="0" * 32)  # type: ignore[arg-type]
            fleet.on_status("pi", name, status, now)
        gone = before.keys() - {entry.name for entry in fleet.by_age()}
        if len(before) == 8 and name not in before:
            assert gone == {min(before, key=lambda one: before[one])}
        else:
            assert not gone


def test_summing_up_looks_at_each_device_once() -> None:
    looked_at = 0

    class Counted(Fleet):
        def online(self, device: Device, now: float) -> bool:
            nonlocal looked_at
            looked_at += 1
            return super().online(device, now)

    fleet = Counted(["pi", "jetson"])
    for index in range(30):
        fleet.on_status("pi" if index % 2 else "jetson", f"d{index}", _status("online", 1), 0)
    assert fleet.summary(1).devices_online == 30 and looked_at == 30


def test_twelve_thousand_devices_are_all_there() -> None:
    fleet = Fleet(["pi"])
    for index in range(12_000):
        fleet.on_status("pi", f"d{index}", _status("online", 1), 0)
    assert fleet.summary(1).devices_online == 12_000
