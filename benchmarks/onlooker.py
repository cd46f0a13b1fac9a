"""Follows a job on the in-process broker: what each device reported last."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Event, Received
from metrics.fleet_page.fleet import Device, Fleet
from sidestream.contract.messages import Telemetry
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack


class Onlooker:
    """Subscribes at once; what comes is small, so it is read where it comes in."""

    def __init__(self, broker: InProcessBroker, job: str, tiers: Iterable[str]) -> None:
        self._topics = Topics(job)
        self._fleet = Fleet(tiers)
        self._lock = threading.Lock()
        self._transport = broker.transport("onlooker")
        self._transport.subscribe(self._topics.uplink_filter("telemetry"))
        self._transport.start(self._on_event)

    def devices(self) -> list[Device]:
        """Every device that has reported."""
        with self._lock:
            return self._fleet.devices()

    @property
    def newest_version(self) -> int:
        """Of the weights that a device has reported as in use."""
        told = [device.telemetry for device in self.devices()]
        return max((one.weights_version for one in told if one is not None), default=0)

    def close(self) -> None:
        self._transport.close()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Received) and event.payload:
            uplink = self._topics.parse_uplink(event.topic)
            with self._lock:
                told = unpack(Telemetry, event.payload)
                self._fleet.on_telemetry(uplink.tier, uplink.device, told, time.monotonic())
