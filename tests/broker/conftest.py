"""The benches on which one set of behaviour tests runs: in-process, amqtt child, Mosquitto child."""

import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

from broker_config.connection.backoff import Backoff
from broker_config.connection.connection import Connection
from broker_config.embedded.broker import EmbeddedBroker, find_mosquitto
from broker_config.settings import BrokerSettings
from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Connected, Disconnected, Event, Received, Transport, Will

PATIENCE_S = 60.0
T = TypeVar("T", Connected, Disconnected, Received)

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="no mosquitto binary")


def quick() -> Backoff:
    return Backoff(first_s=0.02, cap_s=0.1)


class Inbox:
    """An on_event that keeps everything and can be waited on."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def all(self, kind: type[T]) -> list[T]:
        with self._changed:
            return [event for event in self.events if isinstance(event, kind)]

    def wait(self, kind: type[T], count: int = 1, where: Callable[[T], bool] = lambda _: True) -> list[T]:
        def found() -> list[T]:
            return [event for event in self.events if isinstance(event, kind) and where(event)]

        with self._changed:
            enough = self._changed.wait_for(lambda: len(found()) >= count, PATIENCE_S)
            assert enough, f"{count} x {kind.__name__} expected, these came: {self.events[-20:]}"
            return found()

    def payloads(self, count: int) -> list[bytes]:
        return [event.payload for event in self.wait(Received, count)]


class Client:
    """A started transport with its inbox."""

    def __init__(self, transport: Transport, client_id: str, filters: Sequence[str] = ()) -> None:
        self.transport = transport
        self.client_id = client_id
        self.inbox = Inbox()
        for topic_filter in filters:
            transport.subscribe(topic_filter)
        transport.start(self.inbox)
        assert transport.wait_connected(PATIENCE_S), transport.last_error
        self.inbox.wait(Connected)


class Bench(Protocol):
    """What the behaviour tests need of a broker and its transports."""

    kind: str
    topic: str
    """A prefix no other test uses."""

    def make(
        self,
        client_id: str,
        *,
        will: Will | None = None,
        max_inflight: int = 16,
        max_packet_bytes: int = 272 * 1024,
    ) -> Transport: ...

    def client(
        self, name: str, *filters: str, will: Will | None = None, max_inflight: int = 16
    ) -> Client: ...

    def cut(self, client: Client) -> None:
        """Lose the client's connection without a goodbye; it reconnects by itself."""

    def freeze(self, client: Client) -> None:
        """Keep the broker from hearing this client, and the client from hearing it, until thawed."""

    def thaw(self, client: Client) -> None: ...

    def stop_broker(self) -> None: ...

    def start_broker(self) -> None: ...

    def finish(self) -> None: ...


class InProcessBench:
    kind = "inprocess"

    def __init__(self) -> None:
        self.topic = f"t/{uuid.uuid4().hex[:8]}"
        self.broker = InProcessBroker()
        self._thawed = threading.Event()
        self._transports: list[Transport] = []

    def make(
        self,
        client_id: str,
        *,
        will: Will | None = None,
        max_inflight: int = 16,
        max_packet_bytes: int = 272 * 1024,
    ) -> Transport:
        transport = self.broker.transport(
            client_id, will=will, max_inflight=max_inflight, max_packet_bytes=max_packet_bytes
        )
        self._transports.append(transport)
        return transport

    def client(self, name: str, *filters: str, will: Will | None = None, max_inflight: int = 16) -> Client:
        return Client(self.make(name, will=will, max_inflight=max_inflight), name, filters)

    def cut(self, client: Client) -> None:
        self.broker.drop(client.client_id)

    def freeze(self, client: Client) -> None:
        self._thawed = threading.Event()
        self.broker.post(self._wait_for_thaw)

    def thaw(self, client: Client) -> None:
        self._thawed.set()

    def _wait_for_thaw(self) -> None:
        self._thawed.wait(PATIENCE_S)

    def stop_broker(self) -> None:
        self.broker.stop(forget=True)

    def start_broker(self) -> None:
        self.broker.start()

    def finish(self) -> None:
        for transport in self._transports:
            transport.close()
        self.broker.close()


class MqttBench:
    """Real connections, each through a cable that can be cut."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self.kind: str = broker.kind
        self.topic = f"t/{uuid.uuid4().hex[:8]}"
        self.broker = broker
        self._cables: dict[str, Cable] = {}
        self._transports: list[Connection] = []

    def make(
        self,
        client_id: str,
        *,
        will: Will | None = None,
        max_inflight: int = 16,
        max_packet_bytes: int = 272 * 1024,
    ) -> Connection:
        cable = self._cables[client_id] = Cable(self.broker.port)
        connection = Connection(
            BrokerSettings(url=f"mqtt://127.0.0.1:{cable.port}", max_packet_bytes=max_packet_bytes),
            client_id=f"{client_id}-{self.topic}",
            will=will,
            max_inflight=max_inflight,
            backoff=quick(),
        )
        self._transports.append(connection)
        return connection

    def client(self, name: str, *filters: str, will: Will | None = None, max_inflight: int = 16) -> Client:
        return Client(self.make(name, will=will, max_inflight=max_inflight), name, filters)

    def cut(self, client: Client) -> None:
        self._cables[client.client_id].cut()

    def freeze(self, client: Client) -> None:
        self._cables[client.client_id].freeze()

    def thaw(self, client: Client) -> None:
        self._cables[client.client_id].thaw()

    def stop_broker(self) -> None:
        self.broker.stop()

    def start_broker(self) -> None:
        self.broker.start()
        self.broker.wait_ready()

    def finish(self) -> None:
        for transport in self._transports:
            transport.close()
        for cable in self._cables.values():
            cable.close()


class Cable:
    """A TCP proxy to be cut (both ends see the connection break) or frozen (neither hears a thing)."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._flowing.set()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._ends += [near, far]
            ways = [
                threading.Thread(target=self._pump, args=way, daemon=True)
                for way in ((near, far), (far, near))
            ]
            for way in ways:
                way.start()
            threading.Thread(target=_close_after, args=(ways, near, far), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _close_after(ways: list[threading.Thread], *ends: socket.socket) -> None:
    for way in ways:
        way.join()
    for end in ends:
        end.close()


@pytest.fixture(scope="session")
def amqtt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(data_dir=tmp_path_factory.mktemp("amqtt"), kind="amqtt") as broker:
        yield broker


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(data_dir=tmp_path_factory.mktemp("mosquitto"), kind="mosquitto") as broker:
        yield broker


@pytest.fixture(
    params=[
        "inprocess",
        pytest.param("amqtt", marks=pytest.mark.embedded),
        pytest.param("mosquitto", marks=[pytest.mark.mosquitto, needs_mosquitto]),
    ]
)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made: Bench
    made = InProcessBench() if request.param == "inprocess" else MqttBench(_running(request))
    yield made
    made.finish()


def _running(request: pytest.FixtureRequest) -> EmbeddedBroker:
    broker: EmbeddedBroker = request.getfixturevalue(request.param)
    if not broker.running:
        broker.start()
        broker.wait_ready()
    return broker


@pytest.fixture(params=["amqtt", pytest.param("mosquitto", marks=[pytest.mark.mosquitto, needs_mosquitto])])
def own_broker(request: pytest.FixtureRequest, tmp_path: Path) -> EmbeddedBroker:
    """A broker that is not started yet, for tests about its life."""
    return EmbeddedBroker(data_dir=tmp_path / "data", kind=request.param)
