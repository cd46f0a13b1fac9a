"""A broker that cuts the line at a large packet, unsaid, is found out; a flaky one is not blamed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from broker_config.connection.connection import Connection
from broker_config.connection.packet_limit import PacketLimit, power_of_two_below
from broker_config.errors import TooLarge
from broker_config.settings import BrokerSettings
from broker_config.transport import Connected, Disconnected
from tests.broker.conftest import Inbox, quick


def cut(limit: PacketLimit, size: int) -> bool:
    """The line is cut with a packet of that size on its way; whether a limit is found by it."""
    return limit.lost(cut=True, unacknowledged_bytes=size, acknowledged_bytes=0)


def test_two_cuts_behind_messages_of_one_size_are_a_limit() -> None:
    limit = PacketLimit()
    assert not cut(limit, 261_000)
    assert cut(limit, 261_300)
    assert limit.found_bytes == 131_072


@pytest.mark.parametrize(
    "second",
    [
        {"cut": True, "unacknowledged_bytes": 90_000, "acknowledged_bytes": 0},
        {"cut": True, "unacknowledged_bytes": 261_000, "acknowledged_bytes": 262_000},
        {"cut": False, "unacknowledged_bytes": 261_000, "acknowledged_bytes": 0},
    ],
    ids=["another message", "one as large has passed", "a reason was given"],
)
def test_two_cuts_for_other_reasons_are_none(second: dict[str, Any]) -> None:
    limit = PacketLimit()
    assert not cut(limit, 261_000)
    assert not limit.lost(**second)
    assert limit.found_bytes is None


def test_small_messages_are_never_to_blame() -> None:
    limit = PacketLimit()
    assert not any(cut(limit, 3000) for _ in range(5))


def test_a_limit_that_is_still_too_high_is_lowered_again() -> None:
    limit = PacketLimit()
    for size in (261_000, 261_000, 131_000, 131_000):
        cut(limit, size)
    assert limit.found_bytes == 65_536


@pytest.mark.parametrize(("size", "below"), [(131_073, 131_072), (131_072, 65_536), (4097, 4096)])
def test_limits_are_powers_of_two(size: int, below: int) -> None:
    assert power_of_two_below(size) == below


def test_after_the_second_cut_the_next_connection_announces_less_and_the_size_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with cutting_broker(most_bytes=100_000) as port:
        settings = BrokerSettings(url=f"mqtt://127.0.0.1:{port}", protocol="3.1.1")
        connection, inbox = Connection(settings, client_id="c", backoff=quick()), Inbox()
        connection.start(inbox)
        for cuts in (1, 2):
            inbox.wait(Connected, cuts)
            connection.publish("t", bytes(200_000))
            inbox.wait(Disconnected, cuts)
        assert inbox.wait(Connected, 3)[-1].max_packet_bytes == 131_072
        with pytest.raises(TooLarge):
            connection.publish("t", bytes(200_000))
        for cuts in (3, 4):
            inbox.wait(Connected, cuts)
            connection.publish("t", bytes(130_000))
            inbox.wait(Disconnected, cuts)
        assert inbox.wait(Connected, 5)[-1].max_packet_bytes == 65_536
        connection.publish("t", bytes(65_000))
        assert connection.flush(30.0)
        connection.close()
    assert "200011 bytes" in caplog.text and "sidestream doctor" in caplog.text


@contextmanager
def cutting_broker(most_bytes: int) -> Iterator[int]:
    """Speaks just enough MQTT 3.1.1, and closes the connection at a packet over ``most_bytes``."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

    def serve(sock: socket.socket) -> None:
        with suppress(OSError, EOFError), sock, sock.makefile("rb") as stream:
            while True:
                kind, length = exactly(stream.read(1), 1)[0] >> 4, 0
                for shift in range(0, 28, 7):
                    byte = exactly(stream.read(1), 1)[0]
                    length |= (byte & 127) << shift
                    if byte < 128:
                        break
                if length > most_bytes:
                    return
                body = exactly(stream.read(length), length)
                if kind == 1:
                    sock.sendall(b"\x20\x02\x00\x00")
                elif kind == 3:
                    at = 2 + int.from_bytes(body[:2], "big")
                    sock.sendall(b"\x40\x02" + body[at : at + 2])

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def exactly(data: bytes, count: int) -> bytes:
    if len(data) < count:
        raise EOFError
    return data
