"""A split job's fleet on threads, each as slow as it is told to be: the real rooms of both sides.

Beside what a tiny model takes there is sleep, as long as the devices of :mod:`benchmarks.split_queue` would
compute and their links would take.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from benchmarks.fleet import FleetDevice
from benchmarks.split_ends import DeviceEnd, TrainerEnd
from benchmarks.split_queue import Device
from side_trainer.settings.schema import TrainerConfig
from sidestream.backbone.sampled import Ints
from sidestream.backbone.text_input import Tokens
from sidestream.contract.messages import GradientReply, Receipt, is_adapter_message
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import TARGET_MESSAGE_BYTES
from sidestream.split_model.loading import Lower, Pass

_IDLE_S: Final = 0.5
_PATIENCE_S: Final = 600.0
T = TypeVar("T")


class Post(Generic[T]):
    """What is on its way to one end, and when it arrives."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, T]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()

    def send(self, what: T, takes_s: float) -> None:
        """It arrives after so long."""
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + takes_s, next(self._count), what))
            self._changed.notify_all()

    def arrived(self) -> list[T]:
        """What has come since the last time."""
        found = []
        with self._changed:
            while self._due and self._due[0][0] <= time.monotonic():
                found.append(heapq.heappop(self._due)[2])
        return found

    def nudge(self) -> None:
        """Something else has come that the end waits for."""
        with self._changed:
            self._changed.notify_all()

    def wait(self) -> None:
        """Until something may have come."""
        with self._changed:
            left_s = self._due[0][0] - time.monotonic() if self._due else _IDLE_S
            self._changed.wait(max(0.0, min(left_s, _IDLE_S)))


class _PacedPass:
    """A pass whose way back takes its time."""

    def __init__(self, inner: Pass, backward_s: float) -> None:
        self._inner = inner
        self._backward_s = backward_s
        self.states: Floats = inner.states
        self.lengths: Ints = inner.lengths

    def backward(self, gradient: Floats, rows: Sequence[int] | None = None) -> dict[str, Floats]:
        time.sleep(self._backward_s)
        return self._inner.backward(gradient, rows)


class PacedLower:
    """A half that takes its time.

    Args:
        inner: Computes.
        device: How long that takes.
        scale: Times that.
    """

    def __init__(self, inner: Lower, device: Device, scale: float) -> None:
        self._inner = inner
        self._device = device
        self._scale = scale

    @property
    def names(self) -> tuple[str, ...]:
        return self._inner.names

    def load(self, arrays: Mapping[str, Floats]) -> None:
        self._inner.load(arrays)

    def arrays(self) -> dict[str, Floats]:
        return self._inner.arrays()

    def forward(self, tokens: Tokens) -> Pass:
        time.sleep(self._scale * self._device.forward_s)
        return _PacedPass(self._inner.forward(tokens), self._scale * self._device.backward_s)


class PacedFleet:
    """See the module.

    Args:
        config: The trainer's settings.
        fleet: The devices: their data,
        paces: and how long things take them.
        serve_s: By a batch's cut, how long the trainer takes.
        folder: For the devices' state.
        scale: Times all of that.
    """

    def __init__(
        self,
        config: TrainerConfig,
        fleet: Sequence[FleetDevice],
        paces: Sequence[Device],
        serve_s: Mapping[int, float],
        folder: Path,
        scale: float,
    ) -> None:
        self._trainer = TrainerEnd(config)
        self._serve_s = serve_s
        self._scale = scale
        self._inbox: Post[tuple[str, bytes]] = Post()
        self._posts: dict[str, Post[GradientReply | Receipt]] = {one.name: Post() for one in fleet}
        self._failure: BaseException | None = None
        self._paces = dict(zip((one.name for one in fleet), paces, strict=True))
        plan, most = self._trainer.plan, TARGET_MESSAGE_BYTES
        self._devices = {
            one.name: DeviceEnd(one, plan, folder / one.name, most, self._pace(one.name)) for one in fleet
        }

    def run(self) -> float:
        """Seconds until every device is done."""
        self._publish()
        threads = [
            threading.Thread(target=self._device, args=(one,), daemon=True) for one in self._devices.values()
        ]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if self._failure is not None:
                raise self._failure
            assert time.monotonic() - started < _PATIENCE_S, "the fleet does not come to an end"
            self._train()
        took_s = time.monotonic() - started
        for device in self._devices.values():
            device.close()
        self._trainer.journal.close()
        return took_s

    def _pace(self, name: str) -> Callable[[Lower], Lower]:
        return lambda lower: PacedLower(lower, self._paces[name], self._scale)

    # --- the trainer ---------------------------------------------------------------------------------

    def _train(self) -> None:
        for name, payload in self._inbox.arrived():
            receipt = self._trainer.take(self._devices[name].about, payload)
            self._send(name, receipt)
        self._trainer.catch_up()
        self._answer()
        before = self._trainer.method.steps
        busy = self._trainer.serve(time.monotonic())
        if self._trainer.method.steps > before:
            name, _ = self._trainer.replies[-1]
            time.sleep(self._scale * self._serve_s[self._devices[name].cut])
        self._answer()
        self._publish()
        if not busy:
            self._inbox.wait()

    def _answer(self) -> None:
        replies = self._trainer.replies
        while replies:
            self._send(*replies.popleft())

    def _send(self, name: str, what: GradientReply | Receipt) -> None:
        pace = self._paces[name]
        is_large = isinstance(what, GradientReply) and what.gradient is not None
        self._posts[name].send(what, self._scale * (pace.link_s if is_large else pace.latency_s))

    def _publish(self) -> None:
        version = self._trainer.journal.version_base + self._trainer.fold.offset
        for tier, bundle in self._trainer.release().items():
            for device in self._devices.values():
                if device.about.tier == tier:
                    device.adopt(version, bundle)
                    self._posts[device.about.name].nudge()

    # --- a device ------------------------------------------------------------------------------------

    def _device(self, device: DeviceEnd) -> None:
        try:
            name, sent = device.about.name, 0
            post, pace = self._posts[name], self._paces[name]
            while not device.done:
                for what in post.arrived():
                    if isinstance(what, Receipt):
                        device.outbox.streams.receipt(what)
                    else:
                        device.replies.put(what)
                busy = device.step()
                for one in device.outbox.streams.waiting(sent, 16):
                    sent = one.sequence
                    takes_s = pace.latency_s if is_adapter_message(one.payload) else pace.link_s
                    self._inbox.send((name, one.payload), self._scale * takes_s)
                if not busy and not device.done:
                    post.wait()
        except BaseException as exc:
            self._failure = self._failure or exc
