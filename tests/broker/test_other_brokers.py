"""Brokers that are reached through web sockets, or give a client only a part of the topic tree."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.properties import Properties

from broker_config.connection import reasons
from broker_config.connection.connection import Connection
from broker_config.connection.prefix import Prefix
from broker_config.embedded.broker import find_mosquitto
from broker_config.settings import BrokerSettings
from broker_config.transport import Received, Will
from tests.broker.conftest import PATIENCE_S, Client, needs_mosquitto, quick
from tests.broker.test_connection import free_port
from tests.broker.test_tls import authority, certificate
from tests.until import until

LARGE = bytes(range(256)) * 1000


@contextmanager
def mosquitto(folder: Path, port: int, conf: str) -> Iterator[None]:
    """A Mosquitto with a configuration of our own, once something listens on its port."""
    binary = find_mosquitto()
    assert binary is not None
    path = folder / "mosquitto.conf"
    own = f"listener {port} 127.0.0.1"
    if "websockets" in conf:  # which 2.0.11 listens to by IPv4 only if told, and never alone
        own = f"listener {free_port()} 127.0.0.1\nallow_anonymous true\nlistener {port}\nsocket_domain ipv4"
    path.write_text(f"per_listener_settings true\n{own}\n{conf}\nallow_anonymous true\nuser root\n")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([binary, "-c", str(path)], stdout=log, stderr=log)
        try:
            until(lambda: _listens(port), "it listens")
            yield
        finally:
            process.terminate()
            process.wait(30)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def talk(settings: BrokerSettings) -> list[Received]:
    """Two clients, and what one hears of the other: a small message, a large one, a retained one, a will."""
    will = Will(topic="t/will", payload=b"lost")
    said = Client(Connection(settings, client_id="one", will=will, backoff=quick()), "one")
    for payload in (b"small", LARGE):
        said.transport.publish("t/topic", payload, retain=payload == LARGE)
    assert said.transport.flush(PATIENCE_S)
    heard = Client(Connection(settings, client_id="two", backoff=quick()), "two", ["t/#"])
    heard.inbox.wait(Received, 1)
    said.transport.publish("t/topic", b"again")
    heard.inbox.wait(Received, 2)
    for client in (said, heard):
        client.transport.close()
    return heard.inbox.all(Received)


@pytest.mark.mosquitto
@needs_mosquitto
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_web_sockets_carry_messages_large_and_small(tmp_path: Path, protocol: Any) -> None:
    port = free_port()
    with mosquitto(tmp_path, port, "protocol websockets"):
        heard = talk(BrokerSettings(url=f"ws://127.0.0.1:{port}/mqtt", protocol=protocol))
    assert [(one.topic, one.payload, one.retained) for one in heard] == [
        ("t/topic", LARGE, True),
        ("t/topic", b"again", False),
    ]


@pytest.mark.mosquitto
@needs_mosquitto
def test_web_sockets_over_tls_check_the_broker(tmp_path: Path) -> None:
    authority("ca", tmp_path)
    authority("other", tmp_path)
    certificate("broker", "IP:127.0.0.1", tmp_path)
    port = free_port()
    conf = f"protocol websockets\ncertfile {tmp_path}/broker.crt\nkeyfile {tmp_path}/broker.key"
    url = f"wss://127.0.0.1:{port}/mqtt"
    with mosquitto(tmp_path, port, conf):
        heard = talk(BrokerSettings(url=url, ca_file=str(tmp_path / "ca.crt")))
        assert [one.payload for one in heard] == [LARGE, b"again"]
        stranger = Connection(
            BrokerSettings(url=url, ca_file=str(tmp_path / "other.crt")), client_id="x", backoff=quick()
        )
        stranger.start(lambda event: None)
        assert not stranger.wait_connected(2.0)
        assert "is not trusted" in stranger.last_error
        stranger.close()


@pytest.mark.mosquitto
@needs_mosquitto
def test_a_port_without_web_sockets_is_told(tmp_path: Path) -> None:
    with mosquitto(tmp_path, port := free_port(), ""):
        settings = BrokerSettings(url=f"ws://127.0.0.1:{port}/mqtt", connect_timeout_s=2.0)
        lost = Connection(settings, client_id="x", backoff=quick())
        lost.start(lambda event: None)
        assert not lost.wait_connected(5.0)
        assert "web sockets" in lost.last_error or "no answer" in lost.last_error
        lost.close()


@pytest.mark.mosquitto
@needs_mosquitto
def test_a_prefix_stands_before_all_topics_and_nobody_here_sees_it(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "acl").write_text("topic readwrite tenants/17/#\n")
    conf = f"acl_file {tmp_path}/acl"
    with mosquitto(tmp_path, port, conf):
        settings = BrokerSettings(url=f"mqtt://127.0.0.1:{port}/tenants/17")
        onlooker = Connection(BrokerSettings(url=f"mqtt://127.0.0.1:{port}"), client_id="p")
        plain = Client(onlooker, "p", ["tenants/17/#"])
        assert [one.topic for one in talk(settings)] == ["t/topic", "t/topic"]
        assert {one.topic for one in plain.inbox.wait(Received, 3)} == {"tenants/17/t/topic"}
        cut = Connection(
            settings, client_id="dies", will=Will(topic="t/will", payload=b"lost"), backoff=quick()
        )
        dying = Client(cut, "dies")
        taken = Client(Connection(settings, client_id="dies", backoff=quick()), "dies")
        plain.inbox.wait(Received, 1, where=lambda one: one.topic == "tenants/17/t/will")
        for client in (plain, taken, dying):
            client.transport.close()


def test_a_prefix_goes_out_and_comes_back() -> None:
    prefix = Prefix("tenants/17")
    assert prefix.out("sidestream/v1/x/plan") == "tenants/17/sidestream/v1/x/plan"
    assert prefix.back(prefix.out("a/b")) == "a/b"
    assert prefix.out("$SYS/broker/#") == "$SYS/broker/#" == prefix.back("$SYS/broker/#")
    assert Prefix("").out("a") == Prefix("").back("a") == "a"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("RetainAvailable", "keeps no retained messages"),
        ("MaximumQoS", "takes no messages of QoS 1"),
        ("WildcardSubscriptionAvailable", "lets nobody subscribe by wildcards"),
    ],
)
def test_a_broker_that_says_what_it_does_not_do_is_told_in_a_line(name: str, says: str) -> None:
    end = BrokerSettings(url="mqtt://broker.example").endpoint({})
    said = Properties(2)  # type: ignore[no-untyped-call]
    assert reasons.what_lacks(said, end) == "" == reasons.what_lacks(None, end)
    setattr(said, name, 0)
    assert says in reasons.what_lacks(said, end) and "broker.example" in reasons.what_lacks(said, end)
