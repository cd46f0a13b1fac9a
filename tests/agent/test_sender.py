from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.uplink.in_flight import InFlight
from edge_agent.uplink.link_state import LinkState
from edge_agent.uplink.sender import Sender
from metrics.catalogue import AgentMetrics
from sidestream.contract.errors import BrokerError
from sidestream.contract.messages import Flow
from sidestream.contract.plan import FlowPlan
from sidestream.host.trace import Trace
from tests.agent.fake_trainer import TIER, FakeTrainer, sequences
from tests.outboxes import message, receipt_for, refuse
from tests.until import until

DEVICE = "pi-1"


def put(outbox: Outbox, count: int = 1) -> None:
    for _ in range(count):
        outbox.append_all([(message, 1)], Consumed())


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path, job="lights", device=DEVICE, tier=TIER, max_bytes=10**6) as outbox:
        yield outbox


def test_before_there_is_a_plan_nothing_is_sent_though_its_flow_has_come(outbox: Outbox) -> None:
    put(outbox, 3)
    link, sent = LinkState(), list[bytes]()
    link.connection(up=True)
    link.set_flow(Flow(window=8))  # retained, so it may come before
    in_flight = InFlight(link, metrics=AgentMetrics(CollectorRegistry()), trace=Trace())
    transport: Any = SimpleNamespace(publish=lambda topic, payload, **how: sent.append(payload))
    sender = Sender(outbox, transport, "a", "b", link=link, in_flight=in_flight, trace=Trace())
    assert not sender.send_next() and not sent
    link.begin(FlowPlan(window=2, retry_s=60.0))
    turns = 0
    while sender.send_next() and turns < 20:
        turns += 1
    assert turns < 20 and len(sent) == 3, "as many as wait, each once"


class Sending:
    """A sender on its thread, and its connection."""

    def __init__(
        self, broker: InProcessBroker, outbox: Outbox, trainer: FakeTrainer, **settings: Any
    ) -> None:
        self.transport = broker.transport(DEVICE, max_packet_bytes=settings.pop("max_packet_bytes", 10**6))
        self.transport.start(lambda event: None)
        assert self.transport.wait_connected(20)
        self._runs = settings.pop("run", True)
        self._stop, self._woken = threading.Event(), threading.Event()
        self.link = LinkState(self._woken.set)
        self.link.begin(FlowPlan(window=settings.pop("window", 3), retry_s=settings.pop("retry_s", 60.0)))
        self.in_flight = InFlight(
            self.link, metrics=AgentMetrics(CollectorRegistry()), trace=Trace(), **settings
        )
        self.sender = Sender(
            outbox,
            self.transport,
            trainer.topics.activations(TIER, DEVICE),
            trainer.topics.adapter(TIER, DEVICE),
            link=self.link,
            in_flight=self.in_flight,
            trace=Trace(),
        )
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sending:
        if self._runs:
            self._thread.start()
        self.link.connection(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._runs:
            self._thread.join(10)
        assert not self._thread.is_alive()
        self.transport.close()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if not self.sender.send_next():
                    self._woken.wait(0.02)
        except Exception as exc:
            self.error = exc


def sent(sending: Sending, trainer: FakeTrainer) -> list[int]:
    """What has arrived once the sender has sent all that it may; its thread does not run."""
    before = len(trainer.received)
    more = iter(sending.sender.send_next, False)
    count = before + len(list(more))
    trainer.wait(lambda t: len(t.received) >= count)
    return sequences(trainer.received)


def test_no_more_than_a_window_is_under_way(
    broker: InProcessBroker, trainer: FakeTrainer, outbox: Outbox
) -> None:
    trainer.receipts = False
    put(outbox, 8)
    with Sending(broker, outbox, trainer, run=False, window=3) as sending:
        assert sent(sending, trainer) == [1, 2, 3]
        sending.in_flight.receipted(outbox.streams.receipt(receipt_for(outbox, 2)).sequences)
        assert sent(sending, trainer) == [1, 2, 3, 4, 5]
        sending.link.set_flow(Flow(window=5))
        assert sent(sending, trainer) == [1, 2, 3, 4, 5, 6, 7]


def test_a_paused_sender_keeps_everything(
    broker: InProcessBroker, trainer: FakeTrainer, outbox: Outbox
) -> None:
    trainer.receipts = False
    with Sending(broker, outbox, trainer, run=False) as sending:
        sending.link.set_flow(Flow(window=3, pause=True))
        put(outbox, 2)
        sending.link.wake()
        assert sent(sending, trainer) == []
        sending.link.set_flow(Flow(window=3))
        assert sent(sending, trainer) == [1, 2]


def test_a_sender_that_was_told_to_wait_asks_with_its_oldest_batch_now_and_then(
    broker: InProcessBroker, trainer: FakeTrainer, outbox: Outbox
) -> None:
    trainer.receipts = False
    put(outbox, 3)
    now = [0.0]
    with Sending(broker, outbox, trainer, run=False, clock=lambda: now[0], retry_s=10.0) as sending:
        sending.link.set_waits(True)
        for time_s, sends in ((0.0, False), (59.0, False), (61.0, True), (62.0, False), (115.0, False)):
            now[0] = time_s
            assert sending.sender.send_next() is sends
        now[0] = 122.0
        assert sending.sender.send_next() and not sending.sender.send_next()
        sending.link.set_waits(False)
        assert [sending.sender.send_next() for _ in range(4)] == [True, True, True, False]
        trainer.wait(lambda t: sequences(t.received) == [1, 1, 1, 2, 3])


@pytest.mark.slow
def test_without_a_receipt_a_window_is_sent_again_and_again(
    broker: InProcessBroker, trainer: FakeTrainer, outbox: Outbox
) -> None:
    trainer.receipts = False
    put(outbox, 2)
    with Sending(broker, outbox, trainer, retry_s=0.2):
        trainer.wait(lambda t: len(t.received) >= 6)
    assert sequences(trainer.received)[:6] == [1, 2, 1, 2, 1, 2]


def test_after_a_reconnect_everything_unreceipted_goes_again_in_order(
    broker: InProcessBroker, trainer: FakeTrainer, outbox: Outbox
) -> None:
    trainer.receipts = False
    put(outbox, 3)
    with Sending(broker, outbox, trainer, run=False) as sending:
        assert sent(sending, trainer) == [1, 2, 3]
        outbox.streams.receipt(receipt_for(outbox, 1))
        sending.link.connection(False)
        assert sent(sending, trainer) == [1, 2, 3]
        sending.link.connection(True)
        assert sent(sending, trainer) == [1, 2, 3, 2, 3]


def test_an_outage_of_the_broker_loses_nothing(
    broker: InProcessBroker, trainer: FakeTrainer, outbox: Outbox
) -> None:
    trainer.receipts = False
    sending = Sending(broker, outbox, trainer)
    with sending:
        broker.stop()
        put(outbox, 2)
        sending.link.wake()
        until(lambda: not sending.transport.connected, "the outage is noticed")
        broker.start()
        trainer.wait(lambda t: set(sequences(t.received)) == {1, 2})


def test_every_message_tells_the_floor_of_the_moment(
    broker: InProcessBroker, trainer: FakeTrainer, outbox: Outbox
) -> None:
    trainer.receipts = False
    put(outbox, 4)
    outbox.streams.receipt(receipt_for(outbox, 1))
    refuse(outbox, 2)
    with Sending(broker, outbox, trainer):
        trainer.wait(lambda t: len(t.received) == 2)
    assert [(b.sequence, b.floor) for _, b in trainer.received] == [(3, 3), (4, 3)]


def test_a_batch_that_no_broker_will_take_stops_the_agent_with_a_remedy(
    broker: InProcessBroker, trainer: FakeTrainer, outbox: Outbox
) -> None:
    outbox.append_all([(lambda slot: message(slot, width=1000), 1)], Consumed())
    sending = Sending(broker, outbox, trainer, max_packet_bytes=2000)
    with sending:
        until(lambda: sending.error is not None)
    assert isinstance(sending.error, BrokerError)
    assert "batch 1 cannot be sent" in str(sending.error) and "max_packet" in str(sending.error)
    assert outbox.size()[0] == 1
