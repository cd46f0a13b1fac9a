"""A broker in memory, and the transport to it: the fake that stands beside the real connection.

No sockets and no paho. One broker thread does everything that happens "at the broker" and calls every
client's ``on_event``: a message never arrives inside its sender's ``publish``, and each client sees events
in order. Memory is bounded by the clients' in-flight windows and what they retain.

For tests there are outages (:meth:`InProcessBroker.stop`), lost connections (:meth:`~InProcessBroker.drop`),
dead clients (:meth:`~InProcessBroker.kill`) and a broker that acknowledges and then loses or repeats messages
(:meth:`~InProcessBroker.lose_next`, :meth:`~InProcessBroker.duplicate_next`), as real ones do.
"""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from broker_config.testing.inprocess_client import FakeLink, InProcessTransport, Published
from broker_config.topic_filter import matches
from broker_config.transport import ProtocolVersion, Will

log = logging.getLogger(__name__)


@dataclass
class _Fault:
    """What happens to the next ``remaining`` messages that match: delivered ``copies`` times."""

    topic_filter: str
    remaining: int
    copies: int


class InProcessBroker:
    """A broker in this process: QoS 0 and 1, retained messages, wildcards, wills.

    A context manager; closing it stops its thread.

    Args:
        max_packet_bytes: What it announces as its maximum packet size.
        receive_maximum: What it announces as its receive maximum.
        protocol: The MQTT version it pretends to speak.
    """

    def __init__(
        self,
        *,
        max_packet_bytes: int = 1024 * 1024,
        receive_maximum: int = 65535,
        protocol: ProtocolVersion = "5",
    ) -> None:
        self.max_packet_bytes = max_packet_bytes
        self.receive_maximum = receive_maximum
        self.protocol = protocol
        self.down = False
        self._clients: dict[str, InProcessTransport] = {}
        self._retained: dict[str, Published] = {}
        self._faults: list[_Fault] = []
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="inprocess-broker", daemon=True)
        self._thread.start()

    def __enter__(self) -> "InProcessBroker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def transport(
        self,
        client_id: str,
        *,
        will: Will | None = None,
        max_inflight: int = 16,
        max_packet_bytes: int = 272 * 1024,
    ) -> InProcessTransport:
        """A client, not started yet. When it starts, a live client with the same id is thrown out."""
        return InProcessTransport(
            self, client_id, will=will, max_inflight=max_inflight, max_packet_bytes=max_packet_bytes
        )

    @property
    def retained(self) -> dict[str, bytes]:
        """A snapshot of the retained messages: topic to payload."""
        snapshot: dict[str, bytes] = {}
        self.call(lambda: snapshot.update({topic: kept.payload for topic, kept in self._retained.items()}))
        return snapshot

    def drop(self, client_id: str) -> None:
        """Cut a client's connection: its will is published, and it reconnects by itself."""
        self.call(lambda: self._lose(client_id, reconnect=True))

    def kill(self, client_id: str) -> None:
        """End a client as ``kill -9`` would: its will is published, it hears nothing and never comes back."""
        self.call(lambda: self._lose(client_id, reconnect=False))

    def stop(self, *, forget: bool = False) -> None:
        """Begin an outage: every client loses its connection and no will is published.

        Args:
            forget: Lose the retained messages too, as a broker without persistence does.
        """
        self.call(lambda: self._go_down(forget))

    def start(self) -> None:
        """End an outage: every client that still lives reconnects."""
        self.call(self._come_up)

    def lose_next(self, count: int, topic_filter: str = "#") -> None:
        """Acknowledge the next ``count`` matching messages and deliver them to nobody."""
        self.call(lambda: self._faults.append(_Fault(topic_filter, count, copies=0)))

    def duplicate_next(self, count: int, topic_filter: str = "#") -> None:
        """Deliver the next ``count`` matching messages twice."""
        self.call(lambda: self._faults.append(_Fault(topic_filter, count, copies=2)))

    def settle(self, timeout_s: float = 5.0) -> bool:
        """Wait until everything handed to the broker so far has been delivered."""
        done = threading.Event()
        self.post(done.set)
        return done.wait(timeout_s)

    def close(self) -> None:
        """Cut every connection without a will and stop the thread. Idempotent."""
        if self._thread.is_alive():
            self.call(lambda: self._go_down(forget=True))
            self._jobs.put(None)
            self._thread.join()

    # What the transports use.

    def post(self, job: Callable[[], None]) -> None:
        """Have the broker thread run ``job`` after everything posted before."""
        self._jobs.put(job)

    def call(self, job: Callable[[], None]) -> None:
        """Have the broker thread run ``job`` and wait for it."""
        if self.on_broker_thread():
            job()
            return
        done = threading.Event()
        self.post(lambda: _run_then(job, done))
        while not done.wait(0.1) and self._thread.is_alive():
            continue

    def on_broker_thread(self) -> bool:
        """Whether the caller runs on the thread that delivers events."""
        return threading.current_thread() is self._thread

    def register(self, client: InProcessTransport) -> None:
        """Take a started client in, throwing out another one of the same id. Broker thread only."""
        if client.client_id in self._clients:
            self._lose(client.client_id, reconnect=False)
        self._clients[client.client_id] = client
        self.connect(client)

    def connect(self, client: InProcessTransport) -> None:
        """Give ``client`` a new connection, unless there is an outage. Broker thread only."""
        if self.down or not client.wants_connection:
            return
        link = client.connection_made(self)
        for topic_filter in list(link.granted):
            self._send_retained(client, link, topic_filter)

    def subscribe(self, client: InProcessTransport, topic_filter: str, qos: int) -> None:
        """Add a filter to a live connection and send what is retained for it. Broker thread only."""
        link = client.link
        if link is not None and topic_filter not in link.granted:
            link.granted[topic_filter] = qos
            self._send_retained(client, link, topic_filter)

    def take(self, link: FakeLink, message: Published) -> None:
        """Accept a published message: deliver it, then acknowledge it. Broker thread only."""
        for _ in range(self._copies(message.topic)):
            self._route(message)
        link.window.release()

    def goodbye(self, client: InProcessTransport) -> None:
        """End a connection cleanly: no will. Broker thread only."""
        if self._clients.get(client.client_id) is client:
            del self._clients[client.client_id]
        client.connection_lost("closed")

    # What happens at the broker. Broker thread only.

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("the in-process broker failed at one job and goes on")

    def _copies(self, topic: str) -> int:
        for fault in self._faults:
            if fault.remaining > 0 and matches(fault.topic_filter, topic):
                fault.remaining -= 1
                return fault.copies
        return 1

    def _route(self, message: Published) -> None:
        if message.retain and message.payload:
            self._retained[message.topic] = message
        elif message.retain:
            self._retained.pop(message.topic, None)
        for client in list(self._clients.values()):
            client.deliver(message, retained=False)

    def _send_retained(self, client: InProcessTransport, link: FakeLink, topic_filter: str) -> None:
        for topic, message in list(self._retained.items()):
            if client.link is link and matches(topic_filter, topic):
                client.deliver(message, retained=True)

    def _lose(self, client_id: str, *, reconnect: bool) -> None:
        client = self._clients.get(client_id)
        if client is None:
            return
        was_connected = client.link is not None
        if reconnect:
            client.connection_lost("connection lost")
            self.post(lambda: self.connect(client))
        else:
            del self._clients[client_id]
            client.die()
        if was_connected and client.will is not None:
            self._route(
                Published(client.will.topic, client.will.payload, client.will.qos, client.will.retain)
            )

    def _go_down(self, forget: bool) -> None:
        self.down = True
        if forget:
            self._retained.clear()
        for client in self._clients.values():
            client.connection_lost("the broker stopped")

    def _come_up(self) -> None:
        self.down = False
        for client in list(self._clients.values()):
            self.connect(client)


def _run_then(job: Callable[[], None], done: threading.Event) -> None:
    try:
        job()
    finally:
        done.set()
