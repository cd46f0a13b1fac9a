"""Who is concerned by what arrives: everything but batches goes there at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from broker_config.transport import Connected, Disconnected, Event, Received
from metrics.broker_figures import BrokerFigures
from metrics.catalogue import Kind, Reason, TrainerMetrics
from side_trainer.broadcast.announcements import Announcements
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.presence import Presence
from side_trainer.queries.answering import Queries
from side_trainer.receive.refusals import Refusals
from side_trainer.receive.reports import Reports
from side_trainer.receive.setbacks import Setbacks
from sidestream.contract.errors import DecodeError, StorageError
from sidestream.contract.plan import Plan
from sidestream.contract.topics import Topics, Uplink

_SENT: Final = frozenset({Kind.ACTIVATIONS.value, Kind.ADAPTER.value})
"""What comes from devices' outboxes."""


class Router:
    """Belongs to the ingest thread.

    Args:
        topics: The job's.
        link: What the connection is like.
        presence: Hears of connections, and of other trainers.
        announcements: Sees to what is retained.
        setbacks: Hears of weights from before this start.
        reports: Hears devices.
        refusals: For what is on no topic of a device's, or too much.
        metrics: Counts messages and connections.
        broker: Told what the broker says of itself.
        queries: Take in what devices ask.
        plan: The plan as it is now.
    """

    def __init__(
        self,
        topics: Topics,
        link: LeaderTransport,
        presence: Presence,
        announcements: Announcements,
        setbacks: Setbacks,
        reports: Reports,
        refusals: Refusals,
        metrics: TrainerMetrics,
        broker: BrokerFigures,
        queries: Queries,
        plan: Callable[[], Plan],
    ) -> None:
        self._topics = topics
        self._link = link
        self._presence = presence
        self._announcements = announcements
        self._setbacks = setbacks
        self._reports = reports
        self._refusals = refusals
        self._metrics = metrics
        self._broker = broker
        self._queries = queries
        self._plan = plan

    def batches(self, events: list[Event], now: float) -> list[tuple[Uplink, Received]]:
        """See to everything else; return the batches, with where they came from."""
        found: list[tuple[Uplink, Received]] = []
        for event in events:
            if isinstance(event, Connected):
                self._on_connected(event)
            elif isinstance(event, Disconnected):
                self._on_disconnected(event)
            elif not self._hears(event, now) and (uplink := self._uplink(event, now)) is not None:
                found.append((uplink, event))
        return found

    def begin_if_certain(self, now: float) -> None:
        """Start publishing at the moment from which this is certainly the job's one trainer."""
        if not self._presence.begins(now):
            return
        with contextlib.suppress(StorageError):  # it is tried again with the next telemetry
            self._setbacks.rise()
        self._link.confirmed.set()
        self._announcements.begin()

    def _on_connected(self, event: Connected) -> None:
        self._link.max_packet_bytes = event.max_packet_bytes
        self._metrics.broker_connected.set(1)
        self._metrics.reconnects.inc(event.epoch > 1)
        self._presence.connected()

    def _on_disconnected(self, event: Disconnected) -> None:
        self._metrics.taken_over.inc(event.taken_over)
        self._metrics.broker_connected.set(0)
        self._presence.disconnected()
        self._reports.disconnected()
        self._broker.clear()

    def _hears(self, event: Received, now: float) -> bool:
        """See to what is no device's; return whether it was that."""
        base, topic = self._topics.base, event.topic
        if topic.startswith("$"):
            self._broker.take(topic, event.payload)
        elif topic.startswith(f"{base}/trainer/"):
            self._presence.on_event(event)
        elif topic == self._topics.plan or topic.startswith(f"{base}/down/"):
            if not self._link.confirmed.is_set() and topic.endswith("/weights") and event.payload:
                self._setbacks.on_manifest(event)
            self._announcements.on_retained(event, now)
        else:
            return False
        return True

    def _uplink(self, event: Received, now: float) -> Uplink | None:
        """See to a device's reports; where a batch came from, if its device does not send too many."""
        try:
            uplink = self._topics.parse_uplink(event.topic)
        except DecodeError as exc:
            self._refusals.reject(None, event, Reason.UNDECODABLE, str(exc))
            return None
        self._metrics.messages_received.labels(Kind(uplink.kind)).inc()
        if uplink.kind == Kind.QUERY.value:
            self._on_query(uplink, event)
            return None
        if uplink.kind not in _SENT:
            self._reports.on_report(uplink, event, now)
            return None
        self._reports.on_batch(uplink, now)
        return None if self._refusals.drops(uplink, now) else uplink

    def _on_query(self, uplink: Uplink, event: Received) -> None:
        try:
            self._queries.put(uplink, event, self._plan())
        except DecodeError as exc:
            self._refusals.reject(uplink, event, Reason.UNDECODABLE, str(exc))
