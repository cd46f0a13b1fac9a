"""amqtt's defects that would break us stay mended in the child we start; spoken to byte by byte."""

import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from broker_config.connection.connection import Connection
from broker_config.embedded.broker import EmbeddedBroker
from broker_config.settings import BrokerSettings
from broker_config.transport import Connected, Received
from tests.broker.conftest import PATIENCE_S, Client, Inbox, quick

pytestmark = pytest.mark.embedded

DISCONNECT = b"\xe0\x00"
PINGREQ, PINGRESP = b"\xc0\x00", b"\xd0\x00"
ACCEPTED = b"\x20\x02\x00\x00"


def text(value: str) -> bytes:
    return len(value).to_bytes(2, "big") + value.encode()


def packet(kind: int, body: bytes) -> bytes:
    assert len(body) < 128
    return bytes([kind, len(body)]) + body


def connect(client_id: str, will_topic: str = "", level: int = 4) -> bytes:
    flags = 0x26 if will_topic else 0x02  # retained will, clean session
    will = text(will_topic) + text("dead") if will_topic else b""
    properties = b"\x00" if level == 5 else b""
    will_properties = b"\x00" if level == 5 and will_topic else b""
    head = text("MQTT") + bytes([level, flags]) + b"\x00\x1e" + properties
    return packet(0x10, head + text(client_id) + will_properties + will)


def publish(topic: str, payload: bytes, packet_id: int) -> bytes:
    return packet(0x32, text(topic) + packet_id.to_bytes(2, "big") + payload)


@contextmanager
def raw(broker: EmbeddedBroker, greeting: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", broker.port), PATIENCE_S) as sock:
        sock.sendall(greeting)
        assert sock.recv(4) == ACCEPTED
        yield sock


@pytest.fixture
def topic() -> str:
    return f"m/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def watcher(amqtt: EmbeddedBroker, topic: str) -> Iterator[Client]:
    connection = Connection(BrokerSettings(url=amqtt.url), client_id=f"watch-{topic}", backoff=quick())
    yield Client(connection, "watcher", [f"{topic}/#"])
    connection.close()


def test_a_goodbye_with_the_end_of_the_connection_right_behind_it_keeps_the_will_unspoken(
    amqtt: EmbeddedBroker, topic: str, watcher: Client
) -> None:
    burst = b"".join(publish("nobody/listens", b"", number) for number in range(1, 101))
    with raw(amqtt, connect("polite", f"{topic}/will")) as sock:
        sock.sendall(burst + DISCONNECT)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            continue
    watcher.transport.publish(f"{topic}/end", b"end")
    assert watcher.inbox.payloads(1) == [b"end"]


def test_everything_published_before_a_goodbye_is_delivered_in_order(
    amqtt: EmbeddedBroker, topic: str, watcher: Client
) -> None:
    sent = [b"%d" % number for number in range(1, 101)]
    burst = b"".join(publish(f"{topic}/x", payload, int(payload)) for payload in sent)
    with raw(amqtt, connect("burst")) as sock:
        sock.sendall(burst + DISCONNECT)
        while sock.recv(4096):
            continue
    assert watcher.inbox.payloads(100) == sent


def test_connecting_does_not_bring_what_others_subscribed_to(
    amqtt: EmbeddedBroker, topic: str, watcher: Client
) -> None:
    watcher.transport.publish(f"{topic}/secret", b"secret", retain=True)
    watcher.inbox.wait(Received)
    with raw(amqtt, connect("curious")) as sock:
        sock.sendall(PINGREQ)
        assert sock.recv(4096) == PINGRESP
    watcher.transport.publish(f"{topic}/secret", b"", retain=True)


def test_a_fleet_that_connects_at_once_is_served_to_the_last(
    amqtt: EmbeddedBroker, topic: str, watcher: Client
) -> None:
    watcher.transport.publish(f"{topic}/plan", bytes(100_000), retain=True)
    assert watcher.transport.flush(PATIENCE_S)
    inboxes = [Inbox() for _ in range(30)]
    with ExitStack() as stack:
        for number, inbox in enumerate(inboxes):
            settings = BrokerSettings(url=amqtt.url, protocol="3.1.1")
            connection = Connection(settings, client_id=f"fleet-{number}", backoff=quick())
            connection.subscribe(f"{topic}/plan")
            connection.subscribe(f"{topic}/down/{number}")
            stack.callback(connection.close)
            threading.Thread(target=connection.start, args=(inbox,)).start()
        for inbox in inboxes:
            inbox.wait(Received)
    assert all(len(inbox.all(Connected)) == 1 for inbox in inboxes)
    watcher.transport.publish(f"{topic}/plan", b"", retain=True)


def test_an_mqtt_5_client_is_told_at_once_that_this_is_3_1_1(amqtt: EmbeddedBroker, topic: str) -> None:
    with socket.create_connection(("127.0.0.1", amqtt.port), PATIENCE_S) as sock:
        sock.sendall(connect("five", f"{topic}/will", level=5))
        assert sock.recv(4096) == b"\x20\x02\x00\x01"
        assert sock.recv(4096) == b""


def test_a_client_that_comes_back_ends_its_old_connection_and_its_will_is_spoken(
    amqtt: EmbeddedBroker, topic: str, watcher: Client
) -> None:
    with (
        raw(amqtt, connect("back", f"{topic}/will")) as old,
        raw(amqtt, connect("back", f"{topic}/will")) as new,
    ):
        assert old.recv(4096) == b""
        assert watcher.inbox.payloads(1) == [b"dead"]
        new.sendall(PINGREQ)
        assert new.recv(4096) == PINGRESP
        new.sendall(DISCONNECT)
        assert new.recv(4096) == b""
    watcher.transport.publish(f"{topic}/will", b"", retain=True)
