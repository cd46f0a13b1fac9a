"""What only the real connection does: versions, liveness, refusals, and words that say what to do."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from broker_config.connection.connection import Connection
from broker_config.connection.protocol_choice import ProtocolChoice
from broker_config.embedded.broker import EmbeddedBroker
from broker_config.settings import BrokerSettings
from broker_config.transport import Connected, Disconnected, Received
from tests.broker.conftest import PATIENCE_S, Cable, Client, Inbox, needs_mosquitto, quick
from tests.until import until

REFUSE_PASSWORD_311 = b"\x20\x02\x00\x04"
REFUSE_PROTOCOL_311 = b"\x20\x02\x00\x01"
ACCEPT_311 = b"\x20\x02\x00\x00"
ACCEPT_5_TIGHT = b"\x20\x0b\x00\x00\x08\x21\x00\x03\x27\x00\x00\x04\x00"  # receive maximum 3, packets ≤ 1024


@contextmanager
def fake_broker(*answers: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Answers the first packet of each connection with the next of ``answers``; b"" hangs up."""
    heard: list[bytes] = []
    held: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                heard.append(sock.recv(4096))
                answer = answers[min(len(heard), len(answers)) - 1]
                if answer:
                    sock.sendall(answer)
                    held.append(sock)
                else:
                    sock.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1], heard
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
    for sock in held:
        sock.close()


def connect_to(port: int, **settings: object) -> tuple[Connection, Inbox]:
    made = BrokerSettings(url=f"mqtt://127.0.0.1:{port}", **settings)  # type: ignore[arg-type]
    connection, inbox = Connection(made, client_id="c", backoff=quick()), Inbox()
    connection.start(inbox)
    return connection, inbox


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def protocol_level(connect: bytes) -> int:
    return connect[connect.index(b"MQTT") + 4]


@pytest.mark.embedded
def test_a_broker_without_mqtt_5_gets_3_1_1_from_then_on(
    amqtt: EmbeddedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cable = Cable(amqtt.port)
    connection, inbox = connect_to(cable.port)
    assert inbox.wait(Connected)[0].protocol == "3.1.1"
    cable.cut()
    assert [event.protocol for event in inbox.wait(Connected, 2)] == ["3.1.1", "3.1.1"]
    connection.close()
    cable.close()
    assert caplog.text.count("does not speak MQTT 5") == 1


@pytest.mark.mosquitto
@needs_mosquitto
def test_mosquitto_gets_mqtt_5_and_tells_its_limits(mosquitto: EmbeddedBroker) -> None:
    connection, inbox = connect_to(mosquitto.port, max_packet_bytes=8 * 1024 * 1024)
    (connected,) = inbox.wait(Connected)
    assert connected.protocol == "5"
    assert connected.max_packet_bytes == 4 * 1024 * 1024
    assert connected.receive_maximum == 64
    connection.close()


def test_the_brokers_receive_maximum_bounds_the_window() -> None:
    with fake_broker(ACCEPT_5_TIGHT) as (port, _):
        connection, inbox = connect_to(port)
        (connected,) = inbox.wait(Connected)
        assert (connected.receive_maximum, connected.max_packet_bytes) == (3, 1024)
        for _ in range(3):
            connection.publish("x", b"")
        with pytest.raises(Exception, match="3 messages in flight"):
            connection.publish("x", b"", timeout_s=0.01)
        connection.close(timeout_s=0.1)


def test_a_broker_that_hangs_up_on_mqtt_5_is_offered_3_1_1() -> None:
    with fake_broker(b"", ACCEPT_311) as (port, heard):
        connection, inbox = connect_to(port)
        assert inbox.wait(Connected)[0].protocol == "3.1.1"
        connection.close(timeout_s=0.1)
    assert [protocol_level(connect) for connect in heard] == [5, 4]


def test_a_broker_that_never_answers_mqtt_5_is_offered_3_1_1() -> None:
    with fake_broker(b"\x20", ACCEPT_311) as (port, heard):
        connection, inbox = connect_to(port, connect_timeout_s=0.1)
        assert inbox.wait(Connected)[0].protocol == "3.1.1"
        connection.close(timeout_s=0.1)
    assert [protocol_level(connect) for connect in heard] == [5, 4]


def test_a_fixed_protocol_is_kept_and_the_way_out_is_named() -> None:
    with fake_broker(REFUSE_PROTOCOL_311) as (port, heard):
        connection, _ = connect_to(port, protocol="5")
        until(lambda: len(heard) >= 3)
        until(lambda: "broker.protocol" in connection.last_error)
        connection.close()
    assert {protocol_level(connect) for connect in heard if connect} == {5}, (
        "one cut off at the end says nothing"
    )


def test_only_an_explicit_refusal_or_a_long_silence_rules_mqtt_5_out() -> None:
    choice, seen = ProtocolChoice("auto"), []
    choice.silence(lasting=False)
    seen.append(choice.current)
    choice.worked()
    seen.append(choice.current)
    choice.silence(lasting=True)
    choice.worked()
    seen.append(choice.current)
    assert seen == ["3.1.1", "5", "3.1.1"]
    refused = ProtocolChoice("auto")
    assert refused.unsupported()
    refused.worked()
    assert refused.current == "3.1.1"
    assert not refused.unsupported()
    assert not ProtocolChoice("5").unsupported()


def test_a_refused_password_says_which_settings_to_mend() -> None:
    with fake_broker(REFUSE_PASSWORD_311) as (port, _):
        connection, _ = connect_to(port, protocol="3.1.1", username="u", password="hunter2")
        until(lambda: "SIDESTREAM_BROKER_PASSWORD" in connection.last_error)
        assert "hunter2" not in connection.last_error
        connection.close()


def test_an_unreachable_broker_is_reported_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    connection, inbox = connect_to(port)
    until(lambda: connection.counters["failed_attempts"] >= 4)
    assert not connection.wait_connected(0.0)
    assert connection.last_error == f"connection refused by 127.0.0.1:{port}; is the broker running?"
    connection.close()
    assert caplog.text.count("connection refused") == 1
    assert inbox.events == []


def test_an_unknown_host_is_named() -> None:
    settings = BrokerSettings(url="mqtt://no-such-host.invalid")
    connection = Connection(settings, client_id="c", backoff=quick())
    connection.start(lambda _event: None)
    until(lambda: "no-such-host.invalid" in connection.last_error)
    assert "\n" not in connection.last_error
    connection.close()


def test_a_port_that_is_no_broker_is_told_from_one_that_is() -> None:
    with fake_broker(b"HTTP/1.1 400 Bad Request\r\n\r\n", b"") as (port, _):
        connection, _ = connect_to(port, connect_timeout_s=0.2)
        until(lambda: "is that an MQTT broker" in connection.last_error)
        connection.close()


@pytest.mark.embedded
def test_a_connection_that_falls_silent_is_given_up_and_made_anew(amqtt: EmbeddedBroker) -> None:
    cable = Cable(amqtt.port)
    connection, inbox = connect_to(cable.port, keepalive_s=1, protocol="3.1.1")
    inbox.wait(Connected)
    cable.freeze()
    (lost,) = inbox.wait(Disconnected)
    assert "nothing heard" in lost.reason
    cable.thaw()
    inbox.wait(Connected, 2)
    connection.close()
    cable.close()


@pytest.mark.embedded
def test_a_window_that_does_not_move_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    with fake_broker(ACCEPT_311) as (port, _):
        settings = BrokerSettings(url=f"mqtt://127.0.0.1:{port}", protocol="3.1.1", keepalive_s=2)
        connection = Connection(settings, client_id="c", backoff=quick(), stuck_s=10.0, clock=lambda: now[0])
        inbox = Inbox()
        connection.start(inbox)
        inbox.wait(Connected)
        connection.publish("t", b"never acknowledged")

        def a_while_later() -> bool:
            now[0] += 10.5
            return len(inbox.all(Connected)) >= 2

        until(a_while_later, "it has connected anew")
        assert "acknowledged none of 1 messages for 10 s" in inbox.wait(Disconnected)[0].reason
        assert connection.counters["stuck"] == 1
        connection.close()


def test_a_session_that_another_client_takes_over_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with fake_broker(b"\x20\x03\x00\x00\x00" + b"\xe0\x02\x8e\x00", ACCEPT_5_TIGHT) as (port, _):
        connection, inbox = connect_to(port, protocol="5")
        lost = inbox.wait(Disconnected)[0]
        assert lost.taken_over and "another client connected under this client id" in lost.reason
        assert connection.counters["taken_over"] == 1
        inbox.wait(Connected, 2)
        assert "(reason 0x8E)" in caplog.text
        connection.close()


def test_a_quiet_connection_stays_up_by_its_pings(amqtt: EmbeddedBroker) -> None:
    connection, inbox = connect_to(amqtt.port, keepalive_s=1)
    inbox.wait(Connected)
    with pytest.raises(AssertionError):
        until(lambda: bool(inbox.all(Disconnected)), timeout_s=2.5)
    connection.close()


@pytest.mark.embedded
def test_garbage_from_the_broker_costs_the_connection_not_the_thread() -> None:
    with fake_broker(ACCEPT_311 + b"\x30\x05\x00\x02\xff\xfehi") as (port, _):
        connection, inbox = connect_to(port, protocol="3.1.1")
        connection.subscribe("#")
        until(lambda: connection.counters["unsolicited"] >= 1)
        connection.close(timeout_s=0.1)
    with fake_broker(ACCEPT_311 + b"\x90\x00", ACCEPT_311) as (port, _):
        connection, inbox = connect_to(port, protocol="3.1.1")
        inbox.wait(Connected, 2)
        connection.close(timeout_s=0.1)


CHILD = """
import signal, sys
from broker_config.connection.connection import Connection
from broker_config.settings import BrokerSettings
from broker_config.transport import Will
connection = Connection(
    BrokerSettings(url=sys.argv[1]), client_id=sys.argv[2], will=Will(topic=sys.argv[3], payload=b"dead")
)
connection.start(lambda event: None)
assert connection.wait_connected(10)
connection.publish(sys.argv[3], b"alive", retain=True)
connection.flush(10)
if sys.argv[4] == "wait":
    signal.pause()
"""


@pytest.mark.embedded
@pytest.mark.parametrize("end", ["wait", "exit"])
def test_a_process_that_dies_leaves_its_will_and_one_that_just_ends_does_not_hang(
    amqtt: EmbeddedBroker, end: str
) -> None:
    topic = f"t/{end}"
    connection = Connection(BrokerSettings(url=amqtt.url), client_id=f"watch-{end}", backoff=quick())
    watcher = Client(connection, "watcher", [topic])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, amqtt.url, f"child-{end}", topic, end], cwd=Path(__file__).parents[2]
    )
    try:
        watcher.inbox.wait(Received)
        if end == "wait":
            os.kill(child.pid, signal.SIGKILL)
        assert watcher.inbox.payloads(2) == [b"alive", b"dead"]
        assert child.wait(PATIENCE_S) == (-signal.SIGKILL if end == "wait" else 0)
    finally:
        child.kill()
        child.wait()
        connection.close()
