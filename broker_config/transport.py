"""The small interface to a broker that agents and the trainer are written against.

Pure: no sockets, no threads, no paho. Two classes implement it and pass the same behaviour tests:
:class:`broker_config.connection.connection.Connection` (MQTT) and the fake beside it,
:class:`broker_config.testing.inprocess_client.InProcessTransport`.

What an implementation promises:

* Events reach ``on_event`` on one thread, in order: ``Connected(n)``, what was received, ``Disconnected(n)``,
  ``Connected(n + 1)``, and so on. ``Connected`` comes once every remembered filter is subscribed.
* A message is never queued while offline, and at most ``max_inflight`` are unacknowledged at any time.
* An acknowledgement means that the *broker* took the message. It is not delivery: brokers drop
  acknowledged messages. Whoever needs delivery waits for a receipt from the other end.
* A message that was in flight when the connection broke may or may not have arrived.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from sidestream.contract.wire import prepared

ProtocolVersion: TypeAlias = Literal["5", "3.1.1"]


@prepared
class Will(msgspec.Struct, frozen=True, kw_only=True):
    """The message a broker publishes for us when the connection is lost without a goodbye."""

    topic: str
    """Where it is published."""
    payload: bytes
    """What is published."""
    qos: int = 1
    """0 or 1."""
    retain: bool = True
    """Whether late subscribers see it too."""


@prepared
class Connected(msgspec.Struct, frozen=True, kw_only=True):
    """A connection is up and every remembered filter is subscribed."""

    epoch: int
    """Counts this transport's connections: 1, 2, 3, …"""
    protocol: ProtocolVersion
    """The MQTT version agreed on."""
    max_packet_bytes: int
    """The largest packet we may send: the lowest of our own cap, what the broker says that it takes, and what
    it has been found to take (:mod:`broker_config.connection.packet_limit`)."""
    receive_maximum: int
    """How many unacknowledged messages the broker accepts (65535 where it did not say)."""


@prepared
class Disconnected(msgspec.Struct, frozen=True, kw_only=True):
    """The connection announced with the same epoch is gone; the transport is already trying again."""

    epoch: int
    """The epoch of the ``Connected`` that this ends."""
    reason: str
    """Why, in words for a log line."""
    taken_over: bool = False
    """Another client connected under our client id. MQTT 3.1.1 has no way to tell."""


@prepared
class Received(msgspec.Struct, frozen=True, kw_only=True):
    """A message that matches one of our filters."""

    topic: str
    """The topic it was published on."""
    payload: bytes
    """Its body, unchecked: decode it as hostile."""
    retained: bool
    """True when the broker kept it from before our subscription."""
    qos: int
    """The QoS it was delivered with."""
    epoch: int
    """The connection it came by."""
    response_topic: str = ""
    """Where an answer is wanted, as the broker knows it; MQTT 5 only."""
    correlation: bytes = b""
    """What the answer is to carry, so that it is known for one."""


Event: TypeAlias = Connected | Disconnected | Received


class LastWord(NamedTuple):
    """One message to be sent while closing. A plain ``(topic, payload, qos, retain)`` tuple does as well."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


class Transport(Protocol):
    """One client's door to a broker. All methods may be called from any thread but the event thread."""

    @property
    def connected(self) -> bool:
        """Whether a publish would be attempted right now."""

    @property
    def last_error(self) -> str:
        """Why there is no connection, and what to do about it; empty while all is well."""

    @property
    def refused(self) -> int:
        """Messages that the broker refused, as far as it tells: MQTT 3.1.1 has no way to."""

    def start(self, on_event: Callable[[Event], None]) -> None:
        """Begin connecting, and keep connecting until closed. Returns at once.

        Args:
            on_event: Called for every event, on the network thread. It must only enqueue. What it raises
                is logged and counted, and does no other harm.
        """

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until connected.

        Returns:
            Whether there is a connection; if not, see :attr:`last_error`.
        """

    def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        """Subscribe now, if connected, and again on every later connection."""

    def unsubscribe(self, topic_filter: str) -> None:
        """Undo :meth:`subscribe`. A filter that was never subscribed is fine."""

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout_s: float = 10.0
    ) -> None:
        """Hand a message to the connection; block while the in-flight window is full.

        Raises:
            NotConnected: There is no connection. Nothing is queued.
            TooLarge: The message can never be sent on this connection, which goes on unharmed.
            PublishTimeout: The window stayed full for ``timeout_s``. The message was not sent.
        """

    def flush(self, timeout_s: float) -> bool:
        """Wait until every message published on this connection is acknowledged.

        Returns:
            True when all are; False when time ran out or the connection broke first.
        """

    def close(
        self, *, last_words: Sequence[tuple[str, bytes, int, bool]] = (), timeout_s: float = 5.0
    ) -> None:
        """Publish the last words, flush, take leave (so that the will stays unspoken), stop. Idempotent.

        Args:
            last_words: ``(topic, payload, qos, retain)`` each, sent in this order if there is a connection.
            timeout_s: After this long the connection is cut, flushed or not.
        """


_FIXED_HEADER_BYTES = 5  # packet type, and a remaining length of up to four bytes
_TOPIC_LENGTH_BYTES = 2
_PACKET_ID_BYTES = 2
_PROPERTIES_BYTES = 1  # MQTT 5's property length; we send none


def packet_overhead_bytes(topic: str) -> int:
    """What MQTT adds to a payload published on ``topic``, at most."""
    fixed = _FIXED_HEADER_BYTES + _TOPIC_LENGTH_BYTES + _PACKET_ID_BYTES + _PROPERTIES_BYTES
    return fixed + len(topic.encode())
