"""The mailbox keeps the newest message of each topic, within bounds, and what it drops shows in telemetry."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from broker_config.transport import Received
from edge_agent.session import mailbox
from edge_agent.session.mailbox import Mailbox
from edge_agent.session.telemetry import take_telemetry
from edge_agent.store.outbox import Outbox
from metrics.catalogue import AgentMetrics
from metrics.telemetry import DeviceExporter
from sidestream.contract.messages import COUNTERS, Telemetry
from sidestream.contract.wire import pack, unpack


def _message(topic: str, size: int = 1) -> Received:
    return Received(topic=topic, payload=bytes(size), retained=False, qos=1, epoch=1)


def test_a_newer_message_replaces_the_older_one_of_its_topic() -> None:
    box = Mailbox()
    for size in (3, 2, 1):
        box.put(_message("a", size))
    taken = box.take(0.0)
    assert [event.payload for event in taken if isinstance(event, Received)] == [b"\0"]
    assert box.counts() == {"bytes_down": 6} and not box.counts(), "what was told is not told again"


def test_what_is_about_something_else_is_not_replaced() -> None:
    """Such as receipts for several streams of one outbox, which come one after the other on one topic."""
    box = Mailbox(about=lambda event: str(len(event.payload)))
    for size in (3, 2, 3, 1):
        box.put(_message("receipt", size))
    assert [len(event.payload) for event in box.take(0.0) if isinstance(event, Received)] == [2, 3, 1]


def test_what_finds_no_room_is_dropped_and_counted() -> None:
    box = Mailbox()
    box.put(_message("large", mailbox.MAX_BYTES))
    box.put(_message("more"))
    assert len(box.take(0.0)) == 1 and box.counts()["messages_dropped"] == 1


def test_whatever_the_outbox_counts_reaches_telemetry_and_the_agents_metrics(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with Outbox(tmp_path, job="j", device="d", tier="t", max_bytes=5000) as outbox:
        for amount, name in enumerate(COUNTERS, 1):
            outbox.count(name, amount)
        told = take_telemetry(outbox, None, source_ended=False)
        with pytest.raises(AssertionError):
            outbox.count("of_nothing_that_travels", 1)
    DeviceExporter(AgentMetrics(registry)).update(unpack(Telemetry, pack(told)), {})
    assert told.outbox_max_bytes == 5000
    for amount, (name, (metric, _)) in enumerate(COUNTERS.items(), 1):
        assert getattr(told, name) == amount
        assert registry.get_sample_value(f"sidestream_agent_{metric}") == amount
