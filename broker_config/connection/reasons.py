"""Why a connection failed, in one line that says what to do about it. Pure: turns errors into words."""

import socket
import ssl

from paho.mqtt.client import WebsocketConnectionError

from broker_config.settings import Endpoint

UNSUPPORTED_PROTOCOL = 0x84
TAKEN_OVER = 0x8E
PACKET_TOO_LARGE = 0x95
_KEEPALIVE_TIMEOUT = 0x8D

_REFUSALS = {
    0x84: "does not speak the MQTT version in broker.protocol; set it to auto",
    0x85: "does not accept our client id; choose another device or job name",
    0x86: "refused the user name or password; set broker.username and SIDESTREAM_BROKER_PASSWORD",
    0x87: "does not let us in (not authorized); set broker.username and SIDESTREAM_BROKER_PASSWORD, "
    "or the broker's access list",
    0x88: "is not available at the moment",
    0x89: "is busy",
    0x8A: "has banned this client; ask whoever runs it",
}

_GOODBYES = {
    TAKEN_OVER: "another client connected under this client id and took the session over (reason 0x8E); the "
    "id of an agent is a secret of its state directory: was that copied to another machine?",
    0x93: "the broker says we have more messages in flight than it allows",
    PACKET_TOO_LARGE: "the broker says a packet was too large; lower broker.max_packet_bytes",
    0x8B: "the broker is shutting down",
    0x8D: "the broker heard nothing from us for too long",
    0x98: "an administrator of the broker ended the connection",
}


def why_unreachable(error: OSError, endpoint: Endpoint, timeout_s: float) -> str:
    """Why no connection could be opened."""
    address = endpoint.address
    if isinstance(error, ConnectionRefusedError):
        return f"connection refused by {address}; is the broker running?"
    if isinstance(error, socket.gaierror):
        return f"no host named {endpoint.host!r} can be found; check broker.url and the network's DNS"
    if isinstance(error, WebsocketConnectionError):
        return (
            f"{address} does not take web sockets at {endpoint.web_path}: check the path in broker.url "
            "(often /mqtt), and that the port is the one for web sockets"
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message
        return f"the certificate of {address} is not trusted ({why}); check broker.ca_file and broker.url"
    if isinstance(error, ssl.SSLError):
        return f"no TLS with {address} ({error.reason or error}); is that its TLS port?"
    if isinstance(error, TimeoutError):
        return f"no answer from {address} within {timeout_s:g} s; check the address and the firewalls between"
    return f"cannot reach {address}: {error.strerror or error}"


def what_lacks(said: object, endpoint: Endpoint) -> str:
    """What a job needs and this broker says that it does not do; empty if it has all."""
    if getattr(said, "RetainAvailable", 1) == 0:
        return f"the broker at {endpoint.address} keeps no retained messages, and a job lives by them"
    if getattr(said, "MaximumQoS", 1) == 0:
        return f"the broker at {endpoint.address} takes no messages of QoS 1, and a job needs them"
    if getattr(said, "WildcardSubscriptionAvailable", 1) == 0:
        return f"the broker at {endpoint.address} lets nobody subscribe by wildcards, and a job needs that"
    return ""


def why_refused(code: int, name: str, endpoint: Endpoint) -> str:
    """Why the broker answered CONNECT with a refusal."""
    known = _REFUSALS.get(code, f"refused the connection ({name})")
    return f"the broker at {endpoint.address} {known}"


def why_ended(code: int, name: str, from_broker: bool) -> str:
    """Why a connection that was up is no more."""
    if from_broker:
        return _GOODBYES.get(code, f"the broker ended the connection ({name})")
    return "nothing heard from the broker" if code == _KEEPALIVE_TIMEOUT else "connection lost"


def why_hung_up(endpoint: Endpoint) -> str:
    """Why a connection ended before the broker answered CONNECT."""
    if endpoint.tls:
        return (
            f"{endpoint.address} hung up without an answer: it refuses the certificate of broker.cert_file "
            "(revoked, of another authority, or none), or is no MQTT broker; sidestream doctor tells which"
        )
    return f"{endpoint.address} hung up without an answer; is that an MQTT broker, and not its TLS port?"
