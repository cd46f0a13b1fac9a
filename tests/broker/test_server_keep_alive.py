"""A broker may ask for signs of life more often than we would give them, and throws out who does not."""

from __future__ import annotations

import socket

import pytest

from broker_config.connection.connection import Connection
from broker_config.settings import BrokerSettings

_CONNACK = bytes.fromhex("20 06 00 00 03 13 00 01")
"""MQTT 5, success; its one property is Server Keep Alive: 1 s."""
_PINGREQ = bytes.fromhex("c0 00")
_PATIENCE_S = 20.0


@pytest.mark.slow
def test_a_connection_that_has_nothing_to_say_keeps_to_the_brokers_interval() -> None:
    with socket.create_server(("127.0.0.1", 0)) as broker:
        settings = BrokerSettings(url=f"mqtt://127.0.0.1:{broker.getsockname()[1]}", keepalive_s=600)
        connection = Connection(settings, client_id="idle")
        connection.start(lambda _event: None)
        try:
            broker.settimeout(_PATIENCE_S)
            peer, _ = broker.accept()
            with peer:
                peer.settimeout(_PATIENCE_S)
                assert peer.recv(4096)[:1] == b"\x10", "it connects"
                peer.sendall(_CONNACK)
                assert peer.recv(2) == _PINGREQ
        finally:
            connection.close()
