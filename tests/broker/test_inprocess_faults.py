"""The in-process broker misbehaves on demand, as real brokers do on their own."""

import threading
from collections.abc import Iterator

import pytest

from broker_config.errors import NotConnected
from broker_config.transport import Connected, Disconnected, Received, Will
from tests.broker.conftest import InProcessBench


@pytest.fixture
def local() -> Iterator[InProcessBench]:
    bench = InProcessBench()
    yield bench
    bench.finish()


def test_messages_are_acknowledged_and_lost(local: InProcessBench) -> None:
    listener, sender = local.client("listener", "#"), local.client("sender")
    local.broker.lose_next(2, "up/#")
    for topic in ("up/1", "down/1", "up/2", "up/3"):
        sender.transport.publish(topic, b"")
    assert sender.transport.flush(5.0)
    assert [event.topic for event in listener.inbox.wait(Received, 2)] == ["down/1", "up/3"]


def test_messages_are_delivered_twice(local: InProcessBench) -> None:
    listener, sender = local.client("listener", "#"), local.client("sender")
    local.broker.duplicate_next(1)
    for payload in (b"a", b"b"):
        sender.transport.publish("x", payload)
    assert listener.inbox.payloads(3) == [b"a", b"a", b"b"]


def test_a_killed_client_leaves_its_will_and_a_new_one_takes_its_place(local: InProcessBench) -> None:
    watcher = local.client("watcher", "status")
    device = local.client("device", "#", will=Will(topic="status", payload=b"dead"))
    local.broker.kill("device")
    assert watcher.inbox.payloads(1) == [b"dead"]
    assert not device.transport.connected
    with pytest.raises(NotConnected):
        device.transport.publish("x", b"")
    events = len(device.inbox.events)
    again = local.client("device")
    again.transport.publish("x", b"")
    assert local.broker.settle()
    assert len(device.inbox.events) == events


@pytest.mark.parametrize("forget", [False, True])
def test_an_outage_keeps_or_forgets_what_was_retained(local: InProcessBench, forget: bool) -> None:
    client = local.client("client", will=Will(topic="status", payload=b"dead"))
    client.transport.publish("plan", b"p", retain=True)
    client.transport.flush(5.0)
    local.broker.stop(forget=forget)
    assert local.broker.down
    client.inbox.wait(Disconnected)
    local.broker.start()
    client.inbox.wait(Connected, count=2)
    assert local.broker.retained == ({} if forget else {"plan": b"p"})


def test_a_client_started_during_an_outage_connects_when_it_ends(local: InProcessBench) -> None:
    local.broker.stop()
    transport = local.make("early")
    transport.start(lambda _event: None)
    assert not transport.wait_connected(0.01)
    local.broker.start()
    assert transport.wait_connected(20)


def test_nothing_is_delivered_inside_publish(local: InProcessBench) -> None:
    """The sender's thread is never the one on_event runs on, so it may hold its own locks."""
    threads: set[str] = set()
    transport = local.make("self")
    transport.subscribe("#")
    transport.start(lambda _event: threads.add(threading.current_thread().name))
    assert transport.wait_connected(20)
    transport.publish("x", b"")
    assert local.broker.settle()
    assert threads == {"inprocess-broker"}
