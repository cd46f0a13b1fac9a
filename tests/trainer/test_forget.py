"""A device that is out of service is taken off the list by a command."""

from __future__ import annotations

from typing import Literal

import pytest

from broker_config.testing.inprocess import InProcessBroker
from side_trainer.operator.forget import forget
from sidestream.contract.errors import StateError
from sidestream.contract.messages import Status
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack

TOPICS = Topics("colours")


def say(broker: InProcessBroker, tier: str, device: str, state: Literal["online", "offline"]) -> None:
    transport = broker.transport(f"{tier}-{device}")
    transport.start(lambda event: None)
    assert transport.wait_connected(20)
    status = Status(state=state, birth=1, stream="a" * 32)
    transport.publish(TOPICS.status(tier, device), pack(status), retain=True)
    transport.close()


def test_what_stands_of_a_device_that_has_left_is_cleared_and_of_no_other(broker: InProcessBroker) -> None:
    for tier, device in (("big", "d"), ("small", "d"), ("big", "e")):
        say(broker, tier, device, "offline")
    assert forget(broker.transport, "colours", "d") == ["big", "small"]
    assert [*broker.retained] == [TOPICS.status("big", "e")]


@pytest.mark.parametrize("there", [True, False])
def test_a_device_that_is_online_or_unknown_is_refused(broker: InProcessBroker, there: bool) -> None:
    if there:
        say(broker, "big", "d", "online")
    with pytest.raises(StateError, match="is online" if there else "no device 'd'"):
        forget(broker.transport, "colours", "d")
    assert len(broker.retained) == there
