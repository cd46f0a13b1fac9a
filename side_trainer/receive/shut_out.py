"""Topics that are not heard for a while: logged, counted, shown, and left out of the subscriptions."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from typing import Final

from metrics.catalogue import Kind, Reason, TrainerMetrics
from metrics.fleet_page.board import Board
from metrics.fleet_page.fleet import MAX_DEVICES, Fleet
from metrics.fleet_page.view import RefusalView
from side_trainer.receive.penalty import Penalty, PenaltyBox
from side_trainer.receive.subscriptions import Subscriptions
from sidestream.contract.errors import DecodeError
from sidestream.contract.topics import Topics

_log = logging.getLogger(__name__)
_LOGGED: Final = 100
_EVERY_S: Final = 1.0


class ShutOut:
    """Belongs to the ingest thread.

    Args:
        box: Who is in it.
        subscriptions: Kept without them.
        topics: The job's.
        fleet: Who else there is.
        board: Shown them.
        metrics: Counts them.
    """

    def __init__(
        self,
        box: PenaltyBox,
        subscriptions: Subscriptions,
        topics: Topics,
        fleet: Fleet,
        board: Board,
        metrics: TrainerMetrics,
    ) -> None:
        self._box = box
        self._subscriptions = subscriptions
        self._topics = topics
        self._fleet = fleet
        self._board = board
        self._metrics = metrics
        self._senders: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._floods: frozenset[str] = frozenset()
        self._due_s = float("-inf")
        self._count = 0

    def honest(self, tier: str, device: str) -> None:
        """Something that a device sent was taken: it is listened to, announced or not."""
        self._senders[tier, device] = None
        self._senders.move_to_end((tier, device))
        if len(self._senders) > MAX_DEVICES:
            self._senders.popitem(last=False)

    def tick(self, now: float) -> None:
        """Do what has become due: at once where a flood begins or ends, the rest once a second."""
        self._box.tick()
        floods = self._box.floods
        if floods != self._floods or now >= self._due_s:
            self._due_s, self._floods = now + _EVERY_S, floods
            self._leave_out(floods)
            self._show()

    def _show(self) -> None:
        for penalty in self._box.news():
            self._tell(penalty)
        for kind, count in self._box.skipped().items():
            self._metrics.messages_rejected.labels(Kind(kind), Reason.FLOOD).inc(count)
        self._metrics.topics_shut_out.set(len(self._box))

    def _leave_out(self, floods: frozenset[str]) -> None:
        announced = ((one.tier, one.name) for one in self._fleet.by_age()) if floods else ()
        self._subscriptions.leave_out(floods, {*announced, *self._senders} if floods else ())

    def _tell(self, penalty: Penalty) -> None:
        self._metrics.penalties.inc()
        try:
            uplink = self._topics.parse_uplink(penalty.topic)
        except DecodeError:
            return
        self._count += 1
        _log.log(
            logging.WARNING if self._count <= _LOGGED else logging.DEBUG,
            "device %s (%s) sends too much that is refused: its %s are not read for %.0f s, and for "
            "longer if it goes on. See what it sends, or keep it out (sidestream fleet revoke)",
            *(uplink.device, uplink.tier, uplink.kind, penalty.seconds),
            extra={"device": uplink.device, "tier": uplink.tier},
        )
        self._board.refuse(
            RefusalView(
                at_unix_s=round(time.time(), 1),
                tier=uplink.tier,
                device=uplink.device,
                kind=uplink.kind,
                reason=f"{Reason.FLOOD}: not heard for {penalty.seconds:.0f} s",
            )
        )
