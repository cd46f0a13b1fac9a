"""An onlooker at the broker: follows a job's public topics, knows what the fleet said last."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from typing import Final

from broker_config.connection.connection import Connection
from broker_config.settings import BrokerSettings
from broker_config.transport import Event, Received
from metrics.fleet_page.board import Board, Surroundings
from metrics.fleet_page.fleet import Device, Fleet
from metrics.fleet_page.view import TrainerView
from sidestream.contract.errors import BrokerError, DecodeError, MismatchError
from sidestream.contract.messages import Rejection, Status, Telemetry, TrainerStatus
from sidestream.contract.plan import MAX_TIERS, Plan
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack

_CONNECT_S: Final = 15.0


class FleetWatch:
    """Follows one job. Close it when done.

    Args:
        settings: Where the broker is.
        job: The job's name.
        tiers: Those to follow, and then everything else that the job has on the broker, for :meth:`clear`;
            None to follow reports only, of whatever tiers there are.
        on_rejection: Told of a refused message, with its tier and device; on the network's thread.

    Raises:
        BrokerError: if the broker cannot be reached.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        job: str,
        tiers: list[str] | None,
        *,
        on_rejection: Callable[[str, str, Rejection], None] = lambda tier, device, rejection: None,
    ) -> None:
        self._topics = Topics(job)
        self._fleet = Fleet(tiers or ())
        self._any_tier = tiers is None
        self._plan: Plan | None = None
        self._on_rejection = on_rejection
        self._trainer: TrainerStatus | None = None
        self._retained: set[str] = set()
        self._lock = threading.Lock()
        self._transport = Connection(settings, client_id=f"sidestream-watch-{secrets.token_hex(4)}")
        filters = [f"{self._topics.base}/#"]
        if self._any_tier:  # no weights: they are large, and nobody here wants them
            reports = (self._topics.uplink_filter(kind) for kind in ("status", "telemetry"))
            filters = [
                self._topics.plan,
                self._topics.trainer_status,
                *reports,
                self._topics.rejected("+", "+"),
            ]
        for topic_filter in filters:
            self._transport.subscribe(topic_filter)
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

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._transport.connected

    def show_on(self, board: Board, trainer: TrainerView) -> None:
        """Bring a board up to date."""
        now = time.monotonic()
        with self._lock:
            plan, around = self._plan, Surroundings()
            if plan is not None:
                board.task = plan.task
                prints = {name: tier.fingerprint for name, tier in plan.tiers.items()}
                around = Surroundings(fingerprints=prints, labels=plan.labels)
            summaries = self._fleet.summaries(now)
            board.update(self._fleet, summaries, trainer, now=now, unix_s=time.time(), around=around)

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
        if event.topic == self._topics.plan:
            self._plan = unpack(Plan, event.payload)
            return
        rejected = f"{self._topics.base}/rejected/"
        if event.topic.startswith(rejected):
            tier, _, device = event.topic.removeprefix(rejected).partition("/")
            self._on_rejection(tier, device, unpack(Rejection, event.payload))
            return
        uplink = self._topics.parse_uplink(event.topic)
        now = time.monotonic()
        with self._lock:
            if self._any_tier and len(self._fleet.tiers) < MAX_TIERS:
                self._fleet.add_tiers([uplink.tier])
            if uplink.kind == "status":
                self._fleet.on_status(uplink.tier, uplink.device, unpack(Status, event.payload), now)
            elif uplink.kind == "telemetry":
                told = unpack(Telemetry, event.payload)
                self._fleet.on_telemetry(uplink.tier, uplink.device, told, now, unix_s=time.time())
