"""An onlooker at the broker: follows a job's public topics, knows what the fleet said last."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from typing import Final

from broker_config.connection import Connection
from broker_config.settings import BrokerSettings
from broker_config.transport import Event, Received
from contract.errors import BrokerError, DecodeError, MismatchError
from contract.messages import Status, Telemetry, TrainerStatus
from contract.topics import Topics
from contract.wire import unpack
from metrics.fleet import Device, Fleet

_CONNECT_S: Final = 15.0


class Watch:
    """Follows one job. Close it when done.

    Raises:
        BrokerError: if the broker cannot be reached.
    """

    def __init__(self, settings: BrokerSettings, job: str, tiers: list[str]) -> None:
        self._topics = Topics(job)
        self._fleet = Fleet(tiers)
        self._trainer: TrainerStatus | None = None
        self._retained: set[str] = set()
        self._lock = threading.Lock()
        self._transport = Connection(settings, client_id=f"sidestream-watch-{secrets.token_hex(4)}")
        self._transport.subscribe(f"{self._topics.base}/#")
        self._transport.start(self._on_event)
        if not self._transport.wait_connected(_CONNECT_S):
            reason = self._transport.last_error
            self._transport.close()
            raise BrokerError(f"cannot reach the broker: {reason}")

    def close(self) -> None:
        self._transport.close()

    @property
    def trainer(self) -> TrainerStatus | None:
        """What the trainer said last."""
        return self._trainer

    def devices(self) -> list[Device]:
        """What every device said last, by tier and name."""
        with self._lock:
            return self._fleet.devices()

    def clear(self) -> None:
        """Take everything that the job left on the broker off it again, if it can be reached."""
        with contextlib.suppress(BrokerError):
            for topic in sorted(self._retained):
                self._transport.publish(topic, b"", retain=True)
            self._transport.flush(5.0)

    def _on_event(self, event: Event) -> None:
        """Runs on the network thread; these messages are few and small, but for weights, which it skips."""
        if not isinstance(event, Received):
            return
        if event.payload:
            self._retained.add(event.topic)
        try:
            self._note(event)
        except (DecodeError, MismatchError):
            return

    def _note(self, event: Received) -> None:
        if event.topic == self._topics.trainer_status:
            self._trainer = unpack(TrainerStatus, event.payload)
            return
        uplink = self._topics.parse_uplink(event.topic)
        now = time.monotonic()
        with self._lock:
            if uplink.kind == "status":
                self._fleet.on_status(uplink.tier, uplink.device, unpack(Status, event.payload), now)
            elif uplink.kind == "telemetry":
                self._fleet.on_telemetry(uplink.tier, uplink.device, unpack(Telemetry, event.payload), now)
