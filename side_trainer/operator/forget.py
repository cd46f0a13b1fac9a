"""Taking a device that is out of service off the fleet's list: its retained status is cleared.

The list, on page, ``top`` and in metrics, is what stands on the broker; what the device sent stays learnt.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import Final

from broker_config.transport import Event, Received, Transport
from sidestream.contract.errors import BrokerError, StateError, WireError
from sidestream.contract.messages import Status
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack

_CONNECT_S: Final = 15.0
_KEPT_S: Final = 1.0  # what is retained comes right after the subscription


class UnknownDevice(StateError):  # noqa: N818  (it says which)
    """No such device is known on the broker."""


def forget(connect: Callable[[str], Transport], job: str, device: str) -> list[str]:
    """Clear the status of a device that has left, in every tier that has one.

    Args:
        connect: Makes a transport under a client id.
        job: The job's name.
        device: Its name.

    Returns:
        The tiers it was of.

    Raises:
        BrokerError: the broker cannot be reached, or does not take it.
        UnknownDevice: there is none of the name.
        StateError: it is online.
    """
    topics, found, came = Topics(job), dict[str, bytes](), threading.Event()

    def hear(event: Event) -> None:
        if isinstance(event, Received) and event.retained and event.payload:
            found[event.topic] = event.payload
            came.set()

    transport = connect(f"sidestream-forget-{secrets.token_hex(8)}")
    transport.subscribe(topics.status("+", device))
    transport.start(hear)
    try:
        if not transport.wait_connected(_CONNECT_S):
            raise BrokerError(f"the broker cannot be reached: {transport.last_error or 'no answer'}")
        if came.wait(_KEPT_S):
            threading.Event().wait(_KEPT_S / 4)  # it may have been of several tiers
        if not found:
            raise UnknownDevice(f"no device {device!r} of job {job!r} is known on the broker")
        if any(_is_online(payload) for payload in found.values()):
            raise StateError(f"device {device!r} is online: stop its agent first")
        for topic in found:
            transport.publish(topic, b"", retain=True)
        if not transport.flush(_CONNECT_S):
            raise BrokerError("the broker did not take it; try again")
    finally:
        transport.close()
    return sorted(topics.parse_uplink(topic).tier for topic in found)


def _is_online(payload: bytes) -> bool:
    try:
        return unpack(Status, payload).state == "online"
    except WireError:
        return False
