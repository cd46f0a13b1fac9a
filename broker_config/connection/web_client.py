"""paho's client, mended for web sockets."""

from __future__ import annotations

import socket
import ssl
from typing import Any

from paho.mqtt.client import Client


class WebClient(Client):
    """Loses no packet that a web socket takes in parts, and leaves no socket open that becomes none.

    paho's wrapper answers 0 to a write that the kernel took only part of, and keeps the rest; paho then
    forgets the packet, and counts the next one wrongly. As a write that would block it is tried again, which
    sends the rest. Where the other side answers no upgrade, paho lets go of the socket, open.
    """

    _below: socket.socket | None = None

    def _sock_send(self, buf: bytes | bytearray) -> int:
        sent = super()._sock_send(buf)
        if buf and not sent:
            raise BlockingIOError
        return sent

    def _create_socket_connection(self) -> socket.socket:
        self._below = super()._create_socket_connection()
        return self._below

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        wrapped: ssl.SSLSocket = super()._ssl_wrap_socket(tcp_sock)
        self._below = wrapped
        return wrapped

    def _create_socket(self) -> Any:
        try:
            return super()._create_socket()
        except BaseException:
            if self._below is not None:
                self._below.close()
            raise
