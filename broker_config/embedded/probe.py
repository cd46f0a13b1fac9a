"""Ask whether an MQTT broker answers at an address, with the two smallest packets MQTT has."""

import os
import socket

_ACCEPTED = b"\x20\x02\x00\x00"  # CONNACK, no session, code 0
_DISCONNECT = b"\xe0\x00"


def answers_mqtt(host: str, port: int, timeout_s: float) -> bool:
    """Whether a broker at ``host:port`` lets an anonymous MQTT 3.1.1 client in."""
    try:
        with socket.create_connection((host, port), timeout_s) as sock:
            sock.settimeout(timeout_s)
            sock.sendall(_connect_packet())
            accepted = sock.recv(4) == _ACCEPTED
            sock.sendall(_DISCONNECT)
            return accepted
    except OSError:
        return False


def _connect_packet() -> bytes:
    client_id = f"probe-{os.urandom(4).hex()}".encode()
    protocol_and_flags = b"\x00\x04MQTT\x04\x02"  # level 4 is 3.1.1; clean session
    keepalive = b"\x00\x0a"
    body = protocol_and_flags + keepalive + len(client_id).to_bytes(2, "big") + client_id
    return b"\x10" + bytes([len(body)]) + body
