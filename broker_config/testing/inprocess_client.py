"""The client side of the in-process broker; see :mod:`broker_config.testing.inprocess`, which makes these.

Knows the broker only through the few calls of :class:`Broker`.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from broker_config.connection.window import InFlightWindow
from broker_config.errors import NotConnected
from broker_config.topic_filter import check_filter, check_topic, matches
from broker_config.transport import (
    Connected,
    Disconnected,
    Event,
    ProtocolVersion,
    Received,
    Will,
    packet_overhead_bytes,
)
from sidestream.contract.errors import BrokerError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What one client published."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


@dataclass(frozen=True)
class FakeLink:
    """One connection of one client; replaced, never reused."""

    epoch: int
    window: InFlightWindow
    granted: dict[str, int] = field(default_factory=dict)


class Broker(Protocol):
    """What a client needs of its broker."""

    max_packet_bytes: int
    receive_maximum: int
    protocol: ProtocolVersion

    def post(self, job: Callable[[], None]) -> None:
        """Have the broker thread run ``job`` after everything posted before."""

    def call(self, job: Callable[[], None]) -> None:
        """Have the broker thread run ``job`` and wait for it."""

    def on_broker_thread(self) -> bool:
        """Whether the caller runs on the thread that delivers events."""

    def register(self, client: "InProcessTransport") -> None:
        """Take a started client in."""

    def subscribe(self, client: "InProcessTransport", topic_filter: str, qos: int) -> None:
        """Add a filter to a live connection."""

    def take(self, link: FakeLink, message: Published) -> None:
        """Accept a published message."""

    def goodbye(self, client: "InProcessTransport") -> None:
        """End a connection cleanly."""


class InProcessTransport:
    """One client of an :class:`InProcessBroker`; keeps every promise of :mod:`broker_config.transport`."""

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        *,
        will: Will | None,
        max_inflight: int,
        max_packet_bytes: int,
    ) -> None:
        self.client_id = client_id
        self.will = will
        self.link: FakeLink | None = None
        self.counters: Counter[str] = Counter()
        self._broker = broker
        self._max_inflight = max_inflight
        self._max_packet_bytes = min(max_packet_bytes, broker.max_packet_bytes)
        self._filters: dict[str, int] = {}
        self._on_event: Callable[[Event], None] | None = None
        self._epoch = 0
        self._ended = False
        self._changed = threading.Condition()

    @property
    def connected(self) -> bool:
        """See :class:`~broker_config.transport.Transport`."""
        return self.link is not None and not self._ended

    @property
    def last_error(self) -> str:
        """See :class:`~broker_config.transport.Transport`."""
        return "" if self.connected else "the in-process broker is down, or this client is closed"

    @property
    def refused(self) -> int:
        """See :class:`~broker_config.transport.Transport`; this broker refuses nothing."""
        return 0

    def start(self, on_event: Callable[[Event], None]) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        if self._on_event is not None or self._ended:
            raise RuntimeError("a transport is started once")
        self._on_event = on_event
        self._broker.post(lambda: self._broker.register(self))

    def wait_connected(self, timeout_s: float) -> bool:
        """See :class:`~broker_config.transport.Transport`."""
        with self._changed:
            self._changed.wait_for(lambda: self.connected or self._ended, timeout_s)
        return self.connected

    def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        check_filter(topic_filter)
        with self._changed:
            self._filters[topic_filter] = qos
        self._broker.post(lambda: self._broker.subscribe(self, topic_filter, qos))

    def unsubscribe(self, topic_filter: str) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        with self._changed:
            self._filters.pop(topic_filter, None)
        self._broker.post(lambda: self._forget(topic_filter))

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout_s: float = 10.0
    ) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        if self._ended:
            raise NotConnected("the connection is closed")
        self._publish(Published(topic, payload, qos, retain), timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """See :class:`~broker_config.transport.Transport`."""
        self._refuse_event_thread()
        link = self.link
        return link is not None and link.window.drain(timeout_s)

    def close(
        self, *, last_words: Sequence[tuple[str, bytes, int, bool]] = (), timeout_s: float = 5.0
    ) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        self._refuse_event_thread()
        deadline = time.monotonic() + timeout_s
        with self._changed:
            if self._ended:
                return
            self._ended = True
            self._changed.notify_all()
        self._say(last_words, deadline)
        self._broker.call(lambda: self._broker.goodbye(self))

    # What the broker uses, on its thread.

    @property
    def wants_connection(self) -> bool:
        """Whether the client has been started and neither closed nor killed."""
        return self._on_event is not None and not self._ended and self.link is None

    def connection_made(self, broker: Broker) -> FakeLink:
        """The broker took us in: announce it."""
        with self._changed:
            self._epoch += 1
            places = min(self._max_inflight, broker.receive_maximum)
            window = InFlightWindow(places, max_packet_bytes=self._max_packet_bytes)
            self.link = link = FakeLink(self._epoch, window, dict(self._filters))
            self._changed.notify_all()
        connected = Connected(
            epoch=link.epoch,
            protocol=broker.protocol,
            max_packet_bytes=self._max_packet_bytes,
            receive_maximum=broker.receive_maximum,
        )
        self._emit(connected)
        return link

    def connection_lost(self, reason: str) -> None:
        """The connection is gone: wake whoever waits for it and announce it."""
        with self._changed:
            link, self.link = self.link, None
            self._changed.notify_all()
        if link is not None:
            link.window.break_off()
            self._emit(Disconnected(epoch=link.epoch, reason=reason))

    def die(self) -> None:
        """The client's process is gone: nothing is announced, nothing ever happens again."""
        self._ended = True
        self._on_event = None
        self.connection_lost("killed")

    def deliver(self, message: Published, *, retained: bool) -> None:
        """Hand over a message if one of this connection's filters matches it."""
        link = self.link
        if link is None:
            return
        granted = [qos for wanted, qos in link.granted.items() if matches(wanted, message.topic)]
        if granted:
            self._emit(
                Received(
                    topic=message.topic,
                    payload=message.payload,
                    retained=retained,
                    qos=min(max(granted), message.qos),
                    epoch=link.epoch,
                )
            )

    def _emit(self, event: Event) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:
            self.counters["handler_errors"] += 1
            log.exception("on_event of %s failed; the connection goes on", self.client_id)

    def _publish(self, message: Published, timeout_s: float) -> None:
        check_topic(message.topic)
        if message.qos not in (0, 1):
            raise ValueError(f"qos is 0 or 1, not {message.qos}")
        self._refuse_event_thread()
        link = self.link
        if link is None:
            raise NotConnected(self.last_error)
        link.window.acquire(timeout_s, packet_overhead_bytes(message.topic) + len(message.payload))
        self._broker.post(lambda: self._broker.take(link, message))

    def _say(self, last_words: Sequence[tuple[str, bytes, int, bool]], deadline: float) -> None:
        try:
            for word in last_words:
                self._publish(Published(*word), deadline - time.monotonic())
        except BrokerError as error:
            log.info("%s could not say its last words: %s", self.client_id, error)
        self.flush(deadline - time.monotonic())

    def _forget(self, topic_filter: str) -> None:
        if self.link is not None:
            self.link.granted.pop(topic_filter, None)

    def _refuse_event_thread(self) -> None:
        if self._broker.on_broker_thread():
            raise RuntimeError("on_event must only enqueue: it would wait for itself here")
