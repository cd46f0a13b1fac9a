"""One device's junk is charged to it: it is heard no more for a while, and the others go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from broker_config.errors import NotConnected, PublishTimeout, TooLarge
from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Received, Transport
from metrics.catalogue import TrainerMetrics
from side_trainer.broadcast.downlink import Downlink
from side_trainer.journal.journal import Journal
from side_trainer.receive.inbox import Inbox
from side_trainer.receive.penalty import PenaltyBox
from side_trainer.receive.subscriptions import MOST_LISTED, Subscriptions
from sidestream.contract.errors import BrokerError
from sidestream.contract.messages import Receipt, Rejection
from sidestream.contract.topics import Topics, Uplink
from sidestream.contract.wire import unpack
from tests.trainer.conftest import config, devices
from tests.trainer.test_trainer import Listener, born, receipted, send
from tests.trainer.test_watching import scrape, watched
from tests.until import until

TOPICS = Topics("colours")
JUNK = b"\xc1" * 256 * 1024
LOUD = TOPICS.activations("big", "loud")
QUIET = TOPICS.activations("big", "quiet")


def message(topic: str, payload: bytes = JUNK) -> Received:
    return Received(topic=topic, payload=payload, retained=False, qos=1, epoch=1)


# --- the penalty box ----------------------------------------------------------------------------------


def test_a_few_refusals_are_forgiven_and_a_stream_of_them_is_not() -> None:
    now = [0.0]
    box = PenaltyBox(lambda: now[0])
    for _ in range(600):
        box.charge(QUIET, 100)
        now[0] += 1.0
    assert not box.skips(QUIET, 100)
    for _ in range(450):
        box.charge(LOUD, len(JUNK))
    assert box.skips(LOUD, 1) and not box.skips(QUIET, 1)
    assert [penalty.topic for penalty in box.news()] == [LOUD] and box.news() == []
    assert box.skipped() == {"activations": 1}


def test_a_penalty_ends_and_the_next_one_is_twice_as_long() -> None:
    now, lengths = [0.0], []
    box = PenaltyBox(lambda: now[0])
    for _ in range(12):
        for _ in range(450):
            box.charge(LOUD, len(JUNK))
        lengths += [penalty.seconds for penalty in box.news()]
        now[0] += lengths[-1] - 0.1
        box.tick()
        assert box.skips(LOUD, 1)
        now[0] += 0.2
        box.tick()
        assert not box.skips(LOUD, 1) and len(box) == 0
    assert lengths[:3] == [30.0, 60.0, 120.0] and lengths[-1] == 3600.0


def test_refusals_that_the_device_is_told_of_cost_less() -> None:
    box = PenaltyBox(lambda: 0.0)
    for _ in range(40):
        box.charge(LOUD, len(JUNK), told=True)
    assert len(box) == 0


def test_only_a_topic_on_which_it_goes_on_is_a_flood() -> None:
    now = [0.0]
    box = PenaltyBox(lambda: now[0])
    for topic in (LOUD, QUIET):
        for _ in range(450):
            box.charge(topic, len(JUNK))
    for _ in range(200):
        box.skips(LOUD, len(JUNK))
    box.skips(QUIET, len(JUNK))
    now[0] += 1.0
    box.tick()
    assert box.floods == {LOUD}


# --- the inbox ----------------------------------------------------------------------------------------


def test_senders_take_turns_and_one_fills_only_its_own_share() -> None:
    inbox = Inbox(share_bytes=4 * len(JUNK))
    for _ in range(6):
        inbox.offer(message(LOUD))
    inbox.offer(message(QUIET, b"1"))
    inbox.offer(message(QUIET, b"2"))
    assert inbox.dropped == 0 and inbox.box.skipped() == {"activations": 2}
    taken = [event for event in inbox.take(0.0) if isinstance(event, Received)]
    assert [event.topic for event in taken] == [LOUD, QUIET, LOUD, QUIET, LOUD, LOUD]
    assert [event.payload for event in taken if event.topic == QUIET] == [b"1", b"2"]
    assert len(inbox) == 0


def test_what_passes_a_share_is_charged_whatever_is_in_it() -> None:
    inbox = Inbox()
    for _ in range(80):
        inbox.offer(message(LOUD))
    assert inbox.box.skips(LOUD, 1) and not inbox.box.skips(QUIET, 1)


def test_where_telemetry_piles_up_births_and_batches_find_room() -> None:
    inbox = Inbox(max_messages=8)
    for number in range(40):
        inbox.offer(message(TOPICS.telemetry("big", f"d{number}"), b"t"))
    assert (len(inbox), inbox.dropped) == (4, 36), "telemetry fills half of it"
    for number in range(6):
        inbox.offer(message(TOPICS.activations("big", f"d{number}"), b"b"))
    assert (len(inbox), inbox.dropped) == (8, 38), "and batches the rest"
    for number in range(80):
        inbox.offer(message(TOPICS.status("big", f"d{number}"), b"s"))
    assert (len(inbox), inbox.dropped) == (32, 38 + 56), "births and wills find room beyond, and not for ever"


def test_telemetry_waits_behind_what_is_answered_and_is_not_forgotten() -> None:
    inbox = Inbox()
    for number in range(8):
        inbox.offer(message(TOPICS.telemetry("big", f"d{number}"), b"t"))
    for number in range(6):
        inbox.offer(message(TOPICS.activations("big", f"d{number}"), b"b"))
    taken = "".join(event.payload.decode() for event in inbox.take(0.0) if isinstance(event, Received))
    assert taken == "bbbtbbbttttttt"


# --- subscriptions ------------------------------------------------------------------------------------


class Subscribed:
    def __init__(self) -> None:
        self.filters: set[str] = set()

    def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        self.filters.add(topic_filter)

    def unsubscribe(self, topic_filter: str) -> None:
        assert len(self.filters) > 1
        self.filters.remove(topic_filter)


def test_a_topic_is_left_out_by_listing_the_others_and_taken_back_in() -> None:
    transport = Subscribed()
    subscriptions = Subscriptions(cast(Transport, transport), TOPICS)
    subscriptions.begin()
    everything = set(transport.filters)
    known = [("big", "loud"), ("big", "quiet")]
    subscriptions.leave_out({LOUD}, known)
    assert QUIET in transport.filters and LOUD not in transport.filters
    assert everything - transport.filters == {TOPICS.uplink_filter("activations")}
    newcomer = TOPICS.activations("small", "new")
    subscriptions.leave_out({LOUD}, [*known, ("small", "new")])
    assert newcomer in transport.filters
    subscriptions.leave_out(set(), known)
    assert transport.filters == everything


def test_of_a_very_large_fleet_nobody_is_left_out() -> None:
    transport = Subscribed()
    subscriptions = Subscriptions(cast(Transport, transport), TOPICS)
    subscriptions.begin()
    everything = set(transport.filters)
    subscriptions.leave_out({LOUD}, [("big", f"d{index}") for index in range(MOST_LISTED + 1)])
    assert transport.filters == everything


# --- what the trainer says ----------------------------------------------------------------------------


class Wire:
    """A transport of which the test decides what it takes."""

    active, fence = True, 7

    def __init__(self) -> None:
        self.error: BrokerError | None = None
        self.patience: list[float] = []
        self.sent: list[tuple[str, bytes]] = []

    def publish(self, topic: str, payload: bytes, *, timeout_s: float, **_: Any) -> None:
        self.patience.append(timeout_s)
        if self.error is not None:
            raise self.error
        self.sent.append((topic, payload))


def test_a_full_window_is_waited_for_once_and_receipts_follow_when_it_moves(journal: Journal) -> None:
    wire, metrics = Wire(), TrainerMetrics(CollectorRegistry())
    metrics.set_tiers(["big"])
    downlink = Downlink(wire, TOPICS, journal, metrics)  # type: ignore[arg-type]
    wire.error = PublishTimeout("stuck")
    devices = [Uplink(tier="big", device=f"d{index}", kind="activations") for index in range(50)]
    for uplink in [*devices, *devices]:
        downlink.receipt(uplink, "0" * 32)
    assert wire.patience[0] > 0.0 and set(wire.patience[1:]) == {0.0}
    downlink.pay()
    wire.error = NotConnected("gone")
    downlink.pay()
    assert wire.sent == []
    wire.error = None
    downlink.pay()
    assert [topic for topic, _ in wire.sent] == [TOPICS.receipt("big", uplink.device) for uplink in devices]
    assert all(unpack(Receipt, payload).fence == 7 for _, payload in wire.sent)
    downlink.pay()
    assert len(wire.sent) == 50


def test_a_message_that_the_broker_can_never_take_is_named_once(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    wire = Wire()
    downlink = Downlink(wire, TOPICS, journal, TrainerMetrics(CollectorRegistry()))  # type: ignore[arg-type]
    wire.error = TooLarge(9000, 4096)
    for _ in range(3):
        assert not downlink.send(TOPICS.plan, b"")
    assert caplog.text.count("cannot be published") == 1 and "9000 bytes" in caplog.text


def test_a_flood_of_junk_shuts_out_its_sender_and_nobody_else(
    broker: InProcessBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with watched(broker, config(tmp_path, metrics_port=0)) as url:
        listener, fleet = Listener(broker.transport("watch")), devices()
        plan = born(listener, fleet)
        loud, *others = fleet
        topic = TOPICS.activations(loud.tier, loud.name)

        def shut_out() -> bool:
            for _ in range(200):
                listener.transport.publish(topic, JUNK)
            return scrape(url)["sidestream_topics_shut_out{}"] == 1.0

        until(shut_out, "it is shut out")
        for device in others:
            send(listener, device, device.batch(plan))
        until(lambda: all(receipted(listener, device) == 1 for device in others), "the others are heard")
        send(listener, loud, loud.batch(plan))
        send(listener, others[0], others[0].batch(plan))
        until(lambda: receipted(listener, others[0]) == 2, "what came later is receipted")
        assert receipted(listener, loud) == 0
        seen = scrape(url)
        assert seen["sidestream_penalties_total{}"] == 1.0
        assert seen["sidestream_messages_rejected_total{kind=activations,reason=flood}"] > 0
        assert f"device {loud.name} (big) sends too much" in caplog.text
        told = rejections(listener.seen)
        assert 0 < len(told) < 450 and {one.reason[:11] for one in told} == {"undecodable"}


def rejections(seen: Sequence[Received]) -> list[Rejection]:
    return [unpack(Rejection, event.payload) for event in list(seen) if "/rejected/" in event.topic]
