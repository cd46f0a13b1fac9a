"""Two agents under one device's name: one stays, the other waits until the name is free."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.session.duplicate_device import await_departure, ranks_above
from sidestream.contract.messages import Status
from sidestream.contract.wire import pack

STREAM = "0" * 32
TOPIC = "sidestream/v1/j/up/pi/dev/status"


def status(state: str = "online", birth: int = 3, instance: str = "b") -> Status:
    return Status(
        state="online" if state == "online" else "offline", birth=birth, stream=STREAM, instance=instance
    )


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


def test_of_two_agents_exactly_one_gives_way() -> None:
    for birth in (2, 3, 4):
        for mine, other in (("a", "b"), ("b", "a")):
            down = ranks_above(status(birth=birth, instance=other), birth=3, instance=mine)
            up = ranks_above(status(birth=3, instance=mine), birth=birth, instance=other)
            assert down != up


def test_an_earlier_life_of_this_device_and_an_agent_that_knows_no_instances_are_nobody() -> None:
    assert not ranks_above(status(birth=2, instance="z"), birth=3, instance="a")
    assert not ranks_above(status(birth=9, instance=""), birth=3, instance="a")


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [status("offline"), None])
def test_the_waiting_ends_when_the_other_leaves(broker: InProcessBroker, leaves: Status | None) -> None:
    other = broker.transport("dev")
    other.start(lambda event: None)
    assert other.wait_connected(20)
    other.publish(TOPIC, pack(status()), retain=True)
    waiting = threading.Thread(
        target=await_departure, args=(lambda: broker.transport("look"), TOPIC, threading.Event(), 0.02)
    )
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    other.publish(TOPIC, pack(leaves) if leaves else b"", retain=True)
    waiting.join(20.0)
    assert not waiting.is_alive()


def test_the_waiting_ends_when_the_agent_is_stopped(broker: InProcessBroker) -> None:
    stop = threading.Event()
    stop.set()
    await_departure(lambda: broker.transport("look"), TOPIC, stop, 60.0)
