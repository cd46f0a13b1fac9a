"""A bad link: a TCP proxy between a client and the broker, whose faults can be set while it runs.

What it can say of loss: TCP hides lost packets and makes them late. A chunk (1,460 bytes at most) that is
"lost" therefore holds up everything behind it by a retransmission timeout, doubled for each further loss of
the same chunk. Blackouts pass nothing and close nothing; a half-open connection goes on like that for ever.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final

_SEGMENT: Final = 1460
_LEAST_TIMEOUT_S: Final = 0.2  # Linux' smallest retransmission timeout
_QUEUE: Final = 64


@dataclass(kw_only=True)
class Faults:
    """What the link is like now; set fields while it runs."""

    bits_per_s: float = 0.0
    """Each way; 0 for no limit."""
    delay_s: float = 0.0
    """Each way."""
    loss: float = 0.0
    """Share of segments that have to be sent again."""
    dark: bool = False
    """Nothing passes, and nobody is told."""


class BadLink:
    """Listens on a port of its own and passes bytes on. A context manager.

    Args:
        port: The broker's.
        seed: Of the losses.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self.faults = Faults()
        self.forsaken = 0
        """Connections that were left half-open."""
        self._rng = random.Random(seed)
        self._target = port
        self._pairs: list[_Pair] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> BadLink:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in self._pairs:
            pair.close()

    def forsake(self) -> None:
        """Leave every present connection half-open; new ones are good."""
        for pair in self._pairs:
            self.forsaken += not pair.forsaken
            pair.forsaken = True

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._pairs = [pair for pair in self._pairs if not pair.closed]
            self._pairs.append(_Pair(self.faults, self._rng, client, server))


class _Pair:
    """One connection through the link."""

    def __init__(
        self, faults: Faults, rng: random.Random, client: socket.socket, server: socket.socket
    ) -> None:
        self.forsaken = False
        self.closed = False
        self._faults = faults
        self._rng = rng
        self._sockets = (client, server)
        for one, other in ((client, server), (server, client)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
            threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def close(self) -> None:
        self.closed = True
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        """Segments leave one after another at the link's rate, and arrive later by its delay."""
        queue: list[tuple[float, bytes]] = []
        ready = threading.Condition()
        threading.Thread(target=self._deliver, args=(target, queue, ready), daemon=True).start()
        free_s = 0.0
        try:
            while data := source.recv(_SEGMENT):
                free_s = max(free_s, time.monotonic()) + self._seconds(len(data))
                with ready:
                    ready.wait_for(lambda: len(queue) < _QUEUE or self.closed)
                    queue.append((free_s + self._faults.delay_s, data))
                    ready.notify_all()
        except OSError:
            pass
        with ready:
            queue.append((0.0, b""))
            ready.notify_all()

    def _seconds(self, size: int) -> float:
        rate = self._faults.bits_per_s
        busy_s = 8 * size / rate if rate else 0.0
        timeout_s = max(_LEAST_TIMEOUT_S, 2 * self._faults.delay_s)
        while self._rng.random() < self._faults.loss:
            busy_s += timeout_s
            timeout_s *= 2
        return busy_s

    def _deliver(
        self, target: socket.socket, queue: list[tuple[float, bytes]], ready: threading.Condition
    ) -> None:
        while True:
            with ready:
                ready.wait_for(lambda: queue)
                due_s, data = queue[0]
            time.sleep(max(0.0, due_s - time.monotonic()))
            while (self._faults.dark or self.forsaken) and not self.closed:
                time.sleep(0.02)
            with ready:
                queue.pop(0)
                ready.notify_all()
            if not data or self.closed:
                self.close()
                return
            try:
                target.sendall(data)
            except OSError:
                self.close()
                return
