"""The one MQTT connection class: keeps a link to the broker alive until it is closed.

Supervises, and leaves MQTT itself to :mod:`broker_config.connection.link`. One daemon thread
makes a fresh link, serves it until it ends, waits as :class:`~broker_config.connection.backoff.Backoff`
says, and makes the next.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from broker_config.connection.backoff import Backoff
from broker_config.connection.link import Link
from broker_config.connection.link_plan import STUCK_S, Ending, LinkPlan
from broker_config.connection.packet_limit import PacketLimit
from broker_config.connection.prefix import Prefix
from broker_config.connection.protocol_choice import ProtocolChoice
from broker_config.connection.tls import tls_context
from broker_config.errors import NotConnected
from broker_config.settings import BrokerSettings
from broker_config.topic_filter import check_filter, check_topic
from broker_config.transport import Connected, Disconnected, Event, Received, Will
from sidestream.contract.errors import BrokerError

log = logging.getLogger(__name__)

_STABLE_S = 10.0  # a connection that lasted this long was a good one: the next retry is quick again
_LEAVE_S = 1.0  # at least this long is granted to a DISCONNECT, whatever close() was given


class Connection:
    """An agent's or the trainer's connection to its broker; keeps every promise of ``Transport``.

    Args:
        settings: Where the broker is.
        client_id: Unique at the broker: a second client with the same id throws the first one out.
        will: Published by the broker when this connection is lost without a goodbye.
        max_inflight: How many messages may be unacknowledged at once; the broker may allow fewer.
        backoff: How long to wait between attempts.
        stuck_s: A connection on which messages are under way and none moves for so long is made anew.
        clock: Seconds that only rise, for that.

    Raises:
        ConfigError: A setting is wrong or a certificate file unusable.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        client_id: str,
        will: Will | None = None,
        max_inflight: int = 16,
        backoff: Backoff | None = None,
        stuck_s: float = STUCK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if will is not None:
            check_topic(will.topic)
        endpoint = settings.endpoint()
        self._prefix = prefix = Prefix(endpoint.topic_prefix)
        self.counters: Counter[str] = Counter()
        """What went wrong and did no harm: handler_errors, publishes_refused, subscriptions_refused,
        unsolicited; and connections, disconnections, failed_attempts, taken_over, stuck."""
        self._plan = LinkPlan(
            settings=settings,
            endpoint=endpoint,
            tls=tls_context(settings) if endpoint.tls else None,
            client_id=client_id,
            will=will and msgspec.structs.replace(will, topic=prefix.out(will.topic)),
            max_inflight=max_inflight,
            stuck_s=stuck_s,
            clock=clock,
        )
        self._limit = PacketLimit()
        self._protocols = ProtocolChoice(settings.protocol)
        self._backoff = backoff if backoff is not None else Backoff()
        self._filters: dict[str, int] = {}
        self._on_event: Callable[[Event], None] | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self._link: Link | None = None  # the present attempt or connection
        self._live: Link | None = None  # the same, once it is up
        self._epoch = 0
        self._last_error = ""
        self._warned: set[str] = set()

    @property
    def connected(self) -> bool:
        """See :class:`~broker_config.transport.Transport`."""
        return self._live is not None and not self._closing.is_set()

    @property
    def last_error(self) -> str:
        """See :class:`~broker_config.transport.Transport`."""
        return self._last_error

    @property
    def refused(self) -> int:
        """See :class:`~broker_config.transport.Transport`."""
        return self.counters["publishes_refused"]

    def start(self, on_event: Callable[[Event], None]) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        if self._thread is not None or self._closing.is_set():
            raise RuntimeError("a connection is started once")
        self._on_event = on_event
        self._thread = threading.Thread(target=self._supervise, name="mqtt", daemon=True)
        self._thread.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """See :class:`~broker_config.transport.Transport`."""
        with self._changed:
            self._changed.wait_for(lambda: self._live is not None or self._closing.is_set(), timeout_s)
        return self.connected

    def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        check_filter(topic_filter)
        with self._changed:
            self._filters[topic_filter] = qos
            link = self._link
        if link is not None:
            link.resubscribe()

    def unsubscribe(self, topic_filter: str) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        with self._changed:
            self._filters.pop(topic_filter, None)
            link = self._link
        if link is not None:
            link.resubscribe()

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout_s: float = 10.0
    ) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        if self._closing.is_set():
            raise NotConnected("the connection is closed")
        self._publish(topic, payload, qos, retain, timeout_s)

    def answer(self, request: Received, payload: bytes, *, timeout_s: float = 10.0) -> None:
        """Answer a message that wants one; as :meth:`publish`, with QoS 1.

        Raises:
            ValueError: it wants none: it came by MQTT 3.1.1, or names no topic.
        """
        if not request.response_topic:
            raise ValueError("the message names no topic for an answer")
        check_topic(request.response_topic)
        self._refuse_event_thread()
        link = self._live
        if link is None:
            raise NotConnected(self._last_error or f"not connected to {self._plan.endpoint.address} yet")
        link.publish(
            request.response_topic,
            payload,
            qos=1,
            retain=False,
            timeout_s=timeout_s,
            correlation=request.correlation,
        )

    def flush(self, timeout_s: float) -> bool:
        """See :class:`~broker_config.transport.Transport`."""
        self._refuse_event_thread()
        link = self._live
        return link is not None and link.window.drain(timeout_s)

    def close(
        self, *, last_words: Sequence[tuple[str, bytes, int, bool]] = (), timeout_s: float = 5.0
    ) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        self._refuse_event_thread()
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            first = not self._closing.is_set()
            self._closing.set()
            self._changed.notify_all()
        if first and self._live is not None:
            self._say(last_words, deadline_s)
        if self._thread is not None:
            self._stop(self._thread, max(deadline_s - time.monotonic(), _LEAVE_S))

    # The supervisor's thread.

    def _supervise(self) -> None:
        while not self._closing.is_set():
            started_s = time.monotonic()
            link = self._next_link()
            try:
                ending = link.run()
            except Exception as error:
                log.exception("a bug in the connection class; reconnecting")
                ending = Ending(reason=f"internal error: {error!r}")
            was_up = self._lost(link, ending)
            if was_up and time.monotonic() - started_s >= _STABLE_S:
                self._backoff.reset()
                self._warned.clear()
            self._pause(ending)

    def _next_link(self) -> Link:
        link = Link(
            self._plan,
            protocol=self._protocols.current,
            epoch=self._epoch + 1,
            wanted=self._wanted,
            on_up=self._won,
            on_received=self._emit,
            counters=self.counters,
            most_bytes=self._limit.found_bytes,
        )
        with self._changed:
            self._link = link
        if self._closing.is_set():  # before there was a link that could be told
            link.leave()
        return link

    def _wanted(self) -> dict[str, int]:
        with self._changed:
            return {self._prefix.out(one): qos for one, qos in self._filters.items()}

    def _won(self, link: Link, connected: Connected) -> None:
        self.counters["connections"] += 1
        self._protocols.worked()
        with self._changed:
            self._epoch = link.epoch
            self._live = link
            self._last_error = ""
            self._changed.notify_all()
        log.info("connected to %s (MQTT %s)", self._plan.endpoint.address, connected.protocol)
        self._emit(connected)

    def _lost(self, link: Link, ending: Ending) -> bool:
        with self._changed:
            was_up, self._live, self._link = self._live is not None, None, None
            self._last_error = ending.reason
            self._changed.notify_all()
        self.counters["disconnections" if was_up else "failed_attempts"] += 1
        self.counters["taken_over"] += ending.taken_over
        if was_up:
            self._learn_limit(link, ending)
            gone = Disconnected(epoch=link.epoch, reason=ending.reason, taken_over=ending.taken_over)
            self._emit(gone)
        return was_up

    def _learn_limit(self, link: Link, ending: Ending) -> None:
        size = link.window.largest_unacknowledged
        found = self._limit.lost(
            cut=ending.cut and not self._closing.is_set(),
            unacknowledged_bytes=size,
            acknowledged_bytes=link.window.largest_acknowledged,
        )
        if found:
            log.warning(
                "%s cut the line twice while a packet of %d bytes was on its way: it seems to take none so "
                "large, and does not say so. None over %d bytes is sent from now on; sidestream doctor finds "
                "out what it takes, and broker.max_packet_bytes is where to write it down",
                *(self._plan.endpoint.address, size, self._limit.found_bytes),
            )

    def _pause(self, ending: Ending) -> None:
        if self._closing.is_set():
            return
        if ending.unsupported_protocol and self._protocols.unsupported():
            log.info("%s does not speak MQTT 5; using 3.1.1 from now on", self._plan.endpoint.address)
            return
        if ending.hung_up or ending.no_answer:
            self._protocols.silence(lasting=ending.no_answer)
        wait_s = self._backoff.next_s()
        level = logging.DEBUG if ending.reason in self._warned else logging.WARNING
        self._warned.add(ending.reason)
        log.log(level, "%s (retrying in %.1f s)", ending.reason, wait_s)
        self._closing.wait(wait_s)

    def _emit(self, event: Event) -> None:
        assert self._on_event is not None
        if self._prefix.levels and isinstance(event, Received):
            event = msgspec.structs.replace(event, topic=self._prefix.back(event.topic))
        try:
            self._on_event(event)
        except Exception:
            self.counters["handler_errors"] += 1
            log.exception("on_event failed; the connection goes on")

    # Helpers of the public methods.

    def _publish(self, topic: str, payload: bytes, qos: int, retain: bool, timeout_s: float) -> None:
        check_topic(topic)
        if qos not in (0, 1):
            raise ValueError(f"qos is 0 or 1, not {qos}")
        self._refuse_event_thread()
        link = self._live
        if link is None:
            raise NotConnected(self._last_error or f"not connected to {self._plan.endpoint.address} yet")
        link.publish(self._prefix.out(topic), payload, qos=qos, retain=retain, timeout_s=timeout_s)

    def _say(self, last_words: Sequence[tuple[str, bytes, int, bool]], deadline_s: float) -> None:
        try:
            for topic, payload, qos, retain in last_words:
                self._publish(topic, payload, qos, retain, deadline_s - time.monotonic())
        except BrokerError as error:
            log.warning("could not send every last message: %s", error)
        if not self.flush(deadline_s - time.monotonic()):
            log.warning("closing with unacknowledged messages")

    def _stop(self, thread: threading.Thread, timeout_s: float) -> None:
        with self._changed:
            link = self._link
        if link is not None:
            link.leave()
        thread.join(timeout_s)
        if link is not None and thread.is_alive():
            link.cut()
            thread.join(_LEAVE_S)

    def _refuse_event_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("on_event must only enqueue: it would wait for itself here")
