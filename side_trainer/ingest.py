"""The ingest thread: from the inbox to the journal, and only then the receipt.

It alone feeds the job and the fleet, so neither needs a lock.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Final

from broker_config.transport import Received
from side_trainer.broadcast.announcements import Announcements
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.receive.batches import Batches
from side_trainer.receive.duties import Duties
from side_trainer.receive.inbox import Inbox
from side_trainer.receive.reports import Reports
from side_trainer.receive.router import Router
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import StateError
from sidestream.contract.topics import Uplink

_HELD: Final = 256


class Ingest:
    """One step after another: what arrived, what it settles, the batches, and what has become due.

    Args:
        inbox: What the network thread fills.
        router: Sees to all that is no batch.
        reports: What devices say of themselves, by which the job is settled.
        batches: Journals the others.
        link: Says whether anything may be journaled and receipted yet.
        announcements: The plan and the flow.
        duties: What is done now and then.
        wake: Wakes the learner.
        clock: Seconds.
    """

    def __init__(
        self,
        inbox: Inbox,
        router: Router,
        reports: Reports,
        batches: Batches,
        link: LeaderTransport,
        announcements: Announcements,
        duties: Duties,
        *,
        wake: Callable[[bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inbox = inbox
        self._router = router
        self._reports = reports
        self._batches = batches
        self._link = link
        self._announcements = announcements
        self._duties = duties
        self._wake = wake
        self._clock = clock
        self._held: list[tuple[Uplink, Received]] = []  # until this is certainly the job's one trainer
        self._reconfigured: queue.SimpleQueue[TrainerConfig] = queue.SimpleQueue()

    def reconfigure(self, config: TrainerConfig) -> None:
        """Go on with more tiers, from the next step on; for any thread."""
        self._reconfigured.put(config)

    def step(self, timeout_s: float = 0.2) -> None:
        """Handle what is in the inbox, waiting so long for the first of it."""
        self._add_tiers()
        events = self._inbox.take(timeout_s)
        now = self._clock()
        self._held += self._router.batches(events, now)
        self._router.begin_if_certain(now)
        try:
            if self._reports.settle(now):  # births come before the batches that go by what they settle
                self._announcements.plan()
            if self._batches.take(self._due()):
                self._wake(False)
        except StateError as exc:
            self._held = []  # the devices send them again
            self._announcements.storage_failed(exc)
        self._duties.tick(self._clock())

    def throttle(self, behind: bool) -> None:
        """Pause the devices, or let them go on."""
        self._announcements.pause(behind)

    def _due(self) -> list[tuple[Uplink, Received]]:
        """The batches that may be taken; those that may not yet are kept, as far as there is room."""
        if self._link.leads:
            due, self._held = self._held, []
            return due
        self._inbox.dropped += len(self._held[_HELD:])
        self._held = self._held[:_HELD]
        return []

    def _add_tiers(self) -> None:
        """Everything that knows tiers learns of the new ones, then the devices do."""
        while not self._reconfigured.empty():
            if self._reports.add_tiers(self._reconfigured.get()):
                self._announcements.plan()
                self._announcements.flow()
