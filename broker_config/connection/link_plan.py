"""What a link is told before it begins, what it says when it has ended, and how it sees its socket."""

import fcntl
import socket
import ssl
import struct
import termios
import time
from collections.abc import Callable

import msgspec

from broker_config.settings import BrokerSettings, Endpoint
from broker_config.transport import Will
from sidestream.contract.wire import prepared

STUCK_S = 10.0
"""How long messages may be under way without any of them moving, where nobody says otherwise."""


@prepared
class LinkPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What every link of one connection object has in common."""

    settings: BrokerSettings
    """As the user gave them."""
    endpoint: Endpoint
    """Where to connect, and as whom."""
    tls: ssl.SSLContext | None
    """None for a plain connection."""
    client_id: str
    """Our MQTT client id."""
    will: Will | None
    """Our last will."""
    max_inflight: int
    """How many messages we leave unacknowledged at most."""
    stuck_s: float = STUCK_S
    """A connection on which nothing moves for so long, with messages under way, is ended."""
    clock: Callable[[], float] = time.monotonic
    """Seconds that only rise, for that."""


@prepared
class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a link ended."""

    reason: str
    """For a log line."""
    unsupported_protocol: bool = False
    """The broker said that it does not speak this MQTT version."""
    hung_up: bool = False
    """The broker closed the connection without an answer: perhaps for the same reason."""
    no_answer: bool = False
    """The broker took the connection and never answered: perhaps for the same reason."""
    cut: bool = False
    """The other end closed a connection that was up, and said no reason, or that a packet was too large."""
    taken_over: bool = False
    """Another client connected under our client id."""


def unsent_bytes(sock: socket.socket | None) -> int:
    """What the kernel has taken from us and the other end has not acknowledged yet."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0" * 4))[0]) if sock else 0
    except OSError:
        return 0
