"""Devices that are a socket each: MQTT 3.1.1 by hand on one event loop, for thousands in one process.

They stand in for agents where only the trainer is looked at: a will, a birth, telemetry, batches copied from
one that an agent made, and receipts. There is no outbox: one batch at a time is sent until it is receipted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import struct
import time
from typing import Final

import msgspec

from sidestream.contract.messages import ActivationBatch, Receipt, Status, Telemetry, to_bin
from sidestream.contract.quality import Tally
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack, unpack

_KEEPALIVE_S: Final = 3600
_AGAIN_S: Final = 10.0
_PATIENCE_S: Final = 60.0
_CONNACK, _PUBLISH, _SUBACK = 2, 3, 9


class WireDevice(asyncio.Protocol):
    """One of them.

    Args:
        port: The broker's, on this machine.
        topics: The job's.
        number: By which it is named, and its outbox.
        model: A batch to copy, of as many rows as it shall have.
        labels: The job's.
        run: The journal's, of which it has weights.
    """

    def __init__(
        self,
        port: int,
        topics: Topics,
        number: int,
        model: ActivationBatch,
        labels: tuple[str, ...],
        run: str,
    ) -> None:
        self.name = f"light-{number:05d}"
        self.receipt_s: list[float] = []
        """Of each batch that was receipted, the seconds since it was sent."""
        self.unanswered = 0
        """Births that no receipt answered."""
        self._port = port
        self._topics = topics
        self._model = model
        self._labels = labels
        self._run = run
        self._stream = hashlib.sha256(self.name.encode()).hexdigest()[:32]
        self._births = 0
        self._sequence = 0
        self._previous = ""
        self._sent_s: dict[int, float] = {}
        self._heard = asyncio.Event()  # a receipt that was published since we came
        self._up = asyncio.Event()
        self._read = b""
        self._transport: asyncio.WriteTransport | None = None

    async def come(self) -> None:
        """Connect, say so, and wait for the receipt that answers a birth."""
        self._births += 1
        self._heard.clear()
        self._up.clear()
        self._read = b""
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._port)
        await self._up.wait()
        self._publish(self._topics.status("small", self.name), self._status("online"), qos=1, retain=True)
        try:
            await asyncio.wait_for(self._heard.wait(), _PATIENCE_S)
        except asyncio.TimeoutError:
            self.unanswered += 1

    def drop(self) -> None:
        """Close the socket without a word."""
        assert self._transport is not None
        self._transport.abort()

    def report(self, accuracy: float) -> None:
        """Send telemetry."""
        counts = to_bin([4] * len(self._labels), "<u4")
        told = Telemetry(
            stream=self._stream,
            samples_read=64,
            samples_held_out=4 * len(self._labels),
            samples_forwarded=64 - 4 * len(self._labels),
            batches_sent=self._sequence,
            bytes_up=4096,
            outbox_bytes=1024,
            rss_bytes=200 << 20,
            peak_rss_bytes=220 << 20,
            weights_run=self._run,
            weights_version=1,
            accuracy=accuracy,
            evaluation_samples=4 * len(self._labels),
            tally=Tally(
                units=4 * len(self._labels),
                correct=3 * len(self._labels),
                right=to_bin([3] * len(self._labels), "<u4"),
                answered=counts,
                actual=counts,
            ),
            unix_s=time.time(),
        )
        self._publish(self._topics.telemetry("small", self.name), pack(told))

    async def send(self) -> None:
        """Send a batch, again and again if need be, and wait for its receipt."""
        rows, first = len(self._model.sample_ids), self._sequence * len(self._model.sample_ids)
        self._sequence += 1
        samples = list(range(first, first + rows))
        keys = [hashlib.sha256(f"{self._stream} {one}".encode()).digest()[:8] for one in samples]
        batch = msgspec.structs.replace(
            self._model,
            stream=self._stream,
            sequence=self._sequence,
            floor=1,
            previous="",
            samples=to_bin(samples, "<u4"),
            targets=to_bin([one % len(self._labels) for one in samples], "<u2"),
            keys=b"".join(keys),
        )
        self._sent_s[self._sequence] = time.monotonic()
        while self._sent_s:
            self._publish(self._topics.activations("small", self.name), pack(batch), qos=1)
            self._heard.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._heard.wait(), _AGAIN_S)

    # --- MQTT ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        will = _text(self._topics.status("small", self.name)) + _bytes(self._status("offline", "lost"))
        flags = 0x02 | 0x04 | 0x08 | 0x20  # clean session; a will, QoS 1, retained
        head = _text("MQTT") + struct.pack(">BBH", 4, flags, _KEEPALIVE_S)
        self._write(0x10, head + _text(self.name) + will)

    def data_received(self, data: bytes) -> None:
        self._read += data
        while (packet := _first(self._read)) is not None:
            kind, start, end = packet
            body, self._read = self._read[start:end], self._read[end:]
            if kind >> 4 == _CONNACK:
                self._write(0x82, b"\0\1" + _text(self._topics.receipt("small", self.name)) + b"\1")
            elif kind >> 4 == _SUBACK:
                self._up.set()
            elif kind >> 4 == _PUBLISH:
                self._received(kind, body)

    def _received(self, kind: int, body: bytes) -> None:
        (length,) = struct.unpack_from(">H", body)
        payload = body[2 + length :]
        if kind & 0x06:
            self._write(0x40, payload[:2])
            payload = payload[2:]
        upto, now_s = unpack(Receipt, payload).upto, time.monotonic()
        for sequence in [one for one in self._sent_s if one <= upto]:
            self.receipt_s.append(now_s - self._sent_s.pop(sequence))
        if not kind & 0x01:  # what was retained says nothing of this connection
            self._heard.set()

    def _status(self, state: str, reason: str = "") -> bytes:
        status = Status(
            state="online" if state == "online" else "offline",
            birth=self._births,
            stream=self._stream,
            software="0",
            fingerprint=self._model.fingerprint,
            labels=self._labels,
            reason=reason,
        )
        return pack(status)

    def _publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        number = b"\0\2" if qos else b""
        self._write(0x30 | qos << 1 | retain, _text(topic) + number + payload)

    def _write(self, kind: int, body: bytes) -> None:
        assert self._transport is not None
        self._transport.write(bytes([kind]) + _length(len(body)) + body)


def _text(text: str) -> bytes:
    return _bytes(text.encode())


def _bytes(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _length(size: int) -> bytes:
    """A packet's remaining length, seven bits a byte, the lowest first (MQTT 3.1.1, section 2.2.3)."""
    digits = bytearray()
    while True:
        size, digit = size >> 7, size & 0x7F
        digits.append(digit | (0x80 if size else 0))
        if not size:
            return bytes(digits)


def _first(data: bytes) -> tuple[int, int, int] | None:
    """Kind, start and end of the body of the first packet; None while it is not all there."""
    size = shift = 0
    for place in range(1, len(data)):
        size |= (data[place] & 0x7F) << shift
        shift += 7
        if not data[place] & 0x80:
            end = place + 1 + size
            return (data[0], place + 1, end) if len(data) >= end else None
    return None
