"""The amqtt broker as a process of its own: ``python -m broker_config.embedded.amqtt_child CONFIG.json``.

amqtt is the fallback where no Mosquitto is installed: MQTT 3.1.1 only, everything in memory. It listens on
the given host and port only, ends when its standard input closes (its parent is gone) or on SIGTERM, and
prints ``pid N`` once it listens. Our receipts make its losses harmless.

What is mended here of amqtt 0.12, each of which broke us or would:

* A new client was sent the retained messages of *other* clients' subscriptions; and if somebody subscribed
  while that went on, the new client stayed connected and was never served.
* A client that said goodbye lost what it had published just before, acknowledged or not (Python 3.12 on).
* A client that came back before its old connection had ended left that one open, deaf, and its will unspoken.
* It read an MQTT 5 CONNECT as if it were 3.1.1, and mostly waited for ever for bytes that never came.
* Packets had no size limit, and IPv6 addresses could not be listened on.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import Session

from sidestream.contract.wire import prepared

_POLL_S = 0.25
_CONNECT_S = 10.0
_CONNECT = 0x10
_MAX_NAME_BYTES = 6  # "MQTT", or "MQIsdp" long ago
_MQTT_3_1_1 = 4
_UNACCEPTABLE_PROTOCOL = b"\x20\x02\x00\x01"


@prepared
class AmqttConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the child reads from its JSON file."""

    host: str
    """The one address to listen on."""
    port: int
    """The TCP port."""
    max_packet_bytes: int
    """A client that sends a larger packet is disconnected."""

    def for_amqtt(self) -> dict[str, Any]:
        """The same in amqtt's words."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return {
            "listeners": {"default": {"type": "tcp", "bind": f"{host}:{self.port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }


class PacketTooLarge(Exception):  # noqa: N818
    """A client sent a packet over the limit. No error of amqtt's, as it would skip those and read on."""


class SafeBroker(Broker):  # type: ignore[misc]  # amqtt is untyped
    """amqtt's broker, mended as the module says."""

    def __init__(self, config: AmqttConfig) -> None:
        super().__init__(config.for_amqtt())
        self._max_packet_bytes = config.max_packet_bytes

    async def stream_connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        """Serve one client if it speaks MQTT 3.1.1; hold no small packet back, refuse large ones."""
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            head, level = await asyncio.wait_for(_read_connect_head(reader), _CONNECT_S)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError):
            writer.close()
            return
        if level != _MQTT_3_1_1:
            writer.write(_UNACCEPTABLE_PROTOCOL)
            writer.close()
            return
        bounded = BoundedReader(reader, head, self._max_packet_bytes)
        await self._client_connected(listener_name, bounded, StreamWriterAdapter(writer))

    @classmethod
    def _split_bindaddr_port(cls, port_str: str, default_port: int) -> tuple[str | None, int]:
        address, port = super()._split_bindaddr_port(port_str, default_port)
        return (address.strip("[]") if address else None, port)

    async def _client_message_loop(self, client_session: Session, handler: BrokerProtocolHandler) -> None:
        wait_disconnect, undelivered = handler.wait_disconnect, client_session.delivered_message_queue

        async def wait_disconnect_and_deliver() -> Any:
            goodbye = await wait_disconnect()
            while not undelivered.empty():
                await asyncio.sleep(0.001)
            return goodbye

        handler.wait_disconnect = wait_disconnect_and_deliver
        await super()._client_message_loop(client_session, handler)

    async def _delete_session(self, client_id: str) -> None:
        session, handler = self._sessions.get(client_id, (None, None))
        if session is not None and session.transitions.is_connected():
            await handler.handle_connection_closed()
            await handler.stop()
        await super()._delete_session(client_id)

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        subscribers = self._subscriptions.get(subscription[0], [])
        if any(subscriber is session for subscriber, _ in subscribers):
            await super()._publish_retained_messages_for_subscription(subscription, session)


class BoundedReader(StreamReaderAdapter):  # type: ignore[misc]  # amqtt is untyped
    """Refuses to read a packet that is too large, before any of it takes memory.

    Args:
        reader: The connection.
        head: What was already read of it, and comes first.
        max_packet_bytes: The limit.
    """

    def __init__(self, reader: asyncio.StreamReader, head: bytes, max_packet_bytes: int) -> None:
        super().__init__(reader)
        self._head = head
        self._max_packet_bytes = max_packet_bytes

    async def read(self, n: int = -1) -> bytes:
        """Read ``n`` bytes."""
        if n > self._max_packet_bytes:
            raise PacketTooLarge(f"a packet of {n} bytes is over the limit of {self._max_packet_bytes}")
        if self._head:
            taken, self._head = self._head[:n], self._head[n:]
            return taken
        data: bytes = await super().read(n)
        return data


async def _read_connect_head(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    """Read a CONNECT up to its protocol level; the bytes read, and the level.

    Raises:
        ValueError: It is not a CONNECT.
    """
    head = await reader.readexactly(2)
    while head[-1] & 0x80 and len(head) < 5:  # the remaining length goes on
        head += await reader.readexactly(1)
    head += await reader.readexactly(2)
    name_bytes = int.from_bytes(head[-2:], "big")
    if head[0] != _CONNECT or name_bytes > _MAX_NAME_BYTES:
        raise ValueError("not a CONNECT")
    head += await reader.readexactly(name_bytes + 1)
    return head, head[-1]


async def serve(config: AmqttConfig) -> None:
    """Run the broker until SIGTERM, SIGINT, or the parent's end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_reader(sys.stdin.fileno(), stop.set)  # nobody writes there: it is readable when it closes
    broker = SafeBroker(config)
    await broker.start()
    print(f"pid {os.getpid()}", flush=True)
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), timeout=_POLL_S)
    await asyncio.wait_for(broker.shutdown(), timeout=5.0)


def main(config_file: str) -> int:
    """Read the configuration and serve."""
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(levelname)s %(message)s")
    config = msgspec.json.decode(Path(config_file).read_bytes(), type=AmqttConfig)
    try:
        asyncio.run(serve(config))
    except Exception as error:
        print(f"amqtt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
