"""What the ingest thread does beside taking in: after each step, and once a second."""

from __future__ import annotations

import time
from typing import Final

from metrics.catalogue import total
from side_trainer.autotune.tuner import Tuner
from side_trainer.broadcast.announcements import Announcements
from side_trainer.broadcast.downlink import Downlink
from side_trainer.broadcast.presence import Presence
from side_trainer.figures import Figures
from side_trainer.journal.journal import Journal
from side_trainer.quarantine.judge import Judge
from side_trainer.receive.inbox import Inbox
from side_trainer.receive.shut_out import ShutOut
from sidestream.contract.errors import StateError
from sidestream.contract.topics import Uplink

_EVERY_S: Final = 1.0
_SHARE: Final = 0.1


class Sparing:
    """When something is due that takes long where a fleet is large: more seldom, then. Pure.

    Args:
        every_s: So often at most.
        share: Of all time, this much at most.
    """

    def __init__(self, every_s: float = _EVERY_S, share: float = _SHARE) -> None:
        self._every_s = every_s
        self._share = share
        self._from_s = float("-inf")

    def due(self, now: float) -> bool:
        """Whether it may be done."""
        return now >= self._from_s

    def done(self, now: float, took_s: float) -> None:
        """It was done, and took so long."""
        self._from_s = now + max(self._every_s, took_s / self._share)


class Duties:
    """Belongs to the ingest thread.

    Args:
        inbox: Says what found no room.
        journal: Says when a backup was made.
        judge: Decides about devices, and follows the operator.
        downlink: Sends receipts that could not be sent before.
        announcements: Publishes a plan that could not be.
        presence: Publishes the status.
        shut_out: Has topics that are not heard.
        figures: Shows everything.
        tuner: Tells devices what was chosen for them; None where nothing is chosen.
    """

    def __init__(
        self,
        inbox: Inbox,
        journal: Journal,
        judge: Judge,
        downlink: Downlink,
        announcements: Announcements,
        presence: Presence,
        shut_out: ShutOut,
        figures: Figures,
        tuner: Tuner | None = None,
    ) -> None:
        self._inbox = inbox
        self._journal = journal
        self._judge = judge
        self._downlink = downlink
        self._announcements = announcements
        self._presence = presence
        self._shut_out = shut_out
        self._figures = figures
        self._tuner = tuner
        self._backups = journal.backups
        self._done_s = 0.0
        self._showing = Sparing()

    def tick(self, now: float) -> None:
        """Do what has become due."""
        try:
            self._judge.decide()
        except StateError as exc:
            self._announcements.storage_failed(exc)
        self._downlink.pay()
        self._shut_out.tick(now)
        if now - self._done_s < _EVERY_S:
            return
        self._done_s = now
        self._follow_operator()
        self._follow_backups()
        self._announcements.catch_up()
        self._presence.tell()
        if self._tuner is not None:
            self._tuner.tick(now)
        metrics = self._figures.metrics
        metrics.inbox_messages.set(len(self._inbox))
        metrics.inbox_dropped.inc(self._inbox.dropped - total(metrics.inbox_dropped))
        if self._showing.due(now):
            began_s = time.thread_time()  # what others take of a busy machine is no reason to show less
            self._figures.update(self._presence.status, now)
            self._showing.done(now, time.thread_time() - began_s)

    def _follow_operator(self) -> None:
        """Do what was decided on the command line meanwhile."""
        try:
            let_go = self._judge.follow_operator()
        except StateError as exc:
            self._announcements.storage_failed(exc)
            return
        for tier, samples in let_go:
            self._figures.metrics.messages_journaled.labels(tier).inc()
            self._figures.metrics.samples_journaled.labels(tier).inc(samples)

    def _follow_backups(self) -> None:
        """Tell devices once a backup has been made: they need not keep what is in it."""
        backups = self._journal.backups
        if backups != self._backups:
            self._backups = backups
            for one in self._figures.fleet.by_age():
                uplink = Uplink(tier=one.tier, device=one.name, kind="status")
                self._downlink.receipt(uplink, one.stream)
