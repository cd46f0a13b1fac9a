"""paho's client, mended for web sockets."""

from __future__ import annotations

from paho.mqtt.client import Client


class WebClient(Client):
    """Loses no packet that a web socket takes in parts.

    paho's wrapper answers 0 to a write that the kernel took only part of, and keeps the rest; paho then
    forgets the packet, and counts the next one wrongly. As a write that would block it is tried again, which
    sends the rest.
    """

    def _sock_send(self, buf: bytes | bytearray) -> int:
        sent = super()._sock_send(buf)
        if buf and not sent:
            raise BlockingIOError
        return sent
