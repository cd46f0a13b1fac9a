"""What of the trainer is shown: metrics and board brought up to date, once a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from metrics.catalogue import Kind, TrainerMetrics, total, values
from metrics.fleet_page.board import Board
from metrics.fleet_page.fleet import Fleet
from metrics.fleet_page.view import RefusedView, TrainerView
from metrics.telemetry import FleetExporter
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.journal.journal import Journal
from side_trainer.receive.inbox import Inbox
from sidestream.contract.messages import TrainerStatus
from sidestream.contract.tasks import Task


class Figures:
    """Belongs to the ingest thread.

    Args:
        journal: What there is.
        inbox: What waits.
        fleet: The view of the devices.
        transport: Says whether there is a connection.
        board: Shown the fleet.
        metrics: Set to it.
        task: The job's.
        held: Whether a device's batches are kept and not learnt from.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        inbox: Inbox,
        fleet: Fleet,
        transport: LeaderTransport,
        board: Board,
        metrics: TrainerMetrics,
        task: Task,
        held: Callable[[str], bool],
    ) -> None:
        self._journal = journal
        self._inbox = inbox
        self._fleet = fleet
        self._transport = transport
        self._board = board
        self._metrics = metrics
        self._exporter = FleetExporter(metrics, task)
        self._held = held

    def update(self, status: TrainerStatus, now: float) -> Mapping[str, int]:
        """Show everything as it is now; return how many devices are online, by tier."""
        metrics, dropped = self._metrics, self._inbox.dropped
        metrics.inbox_messages.set(len(self._inbox))
        metrics.inbox_dropped.inc(dropped - total(metrics.inbox_dropped))
        metrics.journal_bytes.set(self._journal.size_bytes())
        published = max(self._journal.published, default=0)
        summaries = self._exporter.update(self._fleet, version=published, now=now)
        self._board.update(
            self._fleet,
            summaries,
            self._view(status, published),
            now=now,
            unix_s=time.time(),
            held=self._held,
        )
        return {name: tier.devices_online for name, tier in summaries.items()}

    def _view(self, status: TrainerStatus, published: int) -> TrainerView:
        metrics = self._metrics
        refused = values(metrics.messages_rejected)
        return TrainerView(
            connected=self._transport.connected,
            version=status.version,
            published=published,
            backlog=self._journal.version_base + self._journal.tail - status.version,
            final=status.final,
            samples=status.samples,
            messages=int(values(metrics.messages_received)[(Kind.ACTIVATIONS.value,)]),
            duplicates=int(total(metrics.messages_duplicate)),
            refused=tuple(
                RefusedView(kind=kind, reason=reason, count=int(count))
                for (kind, reason), count in refused.items()
                if count
            ),
            bytes_up=int(total(metrics.up_bytes)),
            bytes_down=int(total(metrics.down_bytes)),
            inbox_dropped=self._inbox.dropped,
            loss=metrics.loss,
        )
