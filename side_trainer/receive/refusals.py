"""Messages that are not taken: counted, told to the operators, and to their device where it can be told."""

from __future__ import annotations

import logging
import time
from typing import Final

from broker_config.transport import Received
from metrics.catalogue import Kind, Reason, TrainerMetrics
from metrics.fleet_page.board import Board
from metrics.fleet_page.view import RefusalView
from side_trainer.broadcast.downlink import Downlink
from side_trainer.receive.inbox import Refused
from side_trainer.receive.penalty import PenaltyBox
from side_trainer.receive.rate_limit import RateLimit
from sidestream.contract.messages import ActivationBatch, AdapterMessage, Rejection, content_digest
from sidestream.contract.topics import Topics, Uplink
from sidestream.contract.wire import pack

_log = logging.getLogger(__name__)
_LOGGED: Final = 20
_TOLD_PER_S: Final = 4.0
_ALL_TOLD_PER_S: Final = 20.0


class Refusals:
    """Belongs to the ingest thread.

    Args:
        downlink: For rejections and receipts.
        topics: The job's.
        board: Shown them.
        metrics: Counts them.
        max_batches_per_s: A device's; 0 for no limit.
        box: Where devices pay for what is refused.
    """

    def __init__(
        self,
        downlink: Downlink,
        topics: Topics,
        board: Board,
        metrics: TrainerMetrics,
        max_batches_per_s: float,
        box: PenaltyBox,
    ) -> None:
        self._downlink = downlink
        self._topics = topics
        self._board = board
        self._metrics = metrics
        self._rate = RateLimit(max_batches_per_s)
        self._box = box
        self._told = RateLimit(_TOLD_PER_S)
        self._all_told = RateLimit(_ALL_TOLD_PER_S)
        self._limited: set[str] = set()
        self._count = 0

    def drops(self, uplink: Uplink, now: float) -> bool:
        """Whether a batch is one too many of its device, which repeats it if it is honest."""
        if self._rate.allows(uplink.device, now):
            return False
        self._metrics.messages_rejected.labels(Kind(uplink.kind), Reason.RATE).inc()
        if uplink.device not in self._limited and len(self._limited) < _LOGGED:
            self._limited.add(uplink.device)
            _log.warning("device %s sends more than max_batches_per_s; the rest is dropped", uplink.device)
        return True

    def refuse(self, uplink: Uplink, event: Received, refusal: Refused) -> None:
        """A batch will never be used: its device need not keep it."""
        self.reject(uplink, event, refusal.reason, str(refusal), refusal.batch)
        if refusal.batch is not None:
            self._downlink.receipt(
                uplink,
                refusal.batch.stream,
                refused_sequence=refusal.batch.sequence,
                refused_digest=content_digest(refusal.batch),
                reason=str(refusal)[:500],
            )

    def have_wait(
        self, uplink: Uplink, event: Received, batch: ActivationBatch | AdapterMessage, room_bytes: int
    ) -> None:
        """Tell a quarantined device to keep what finds no room here."""
        why = (
            f"{uplink.device} is quarantined, and there is no room for more of what such devices send: "
            f"release it, or raise quarantine_max_mib = {room_bytes >> 20}"
        )
        self.reject(uplink, event, Reason.QUARANTINE, why, batch)
        self._downlink.receipt(uplink, batch.stream, reason=why, wait=True)

    def reject(
        self,
        uplink: Uplink | None,
        event: Received,
        reason: Reason,
        text: str,
        batch: ActivationBatch | AdapterMessage | None = None,
    ) -> None:
        """Count a refused message and tell the operators; its content goes nowhere."""
        kind = Kind(uplink.kind) if uplink else Kind.ACTIVATIONS
        self._metrics.messages_rejected.labels(kind, reason).inc()
        self._log(event, kind, reason, text)
        if uplink is None:
            return
        self._box.charge(event.topic, len(event.payload), told=batch is not None)
        self._board.refuse(
            RefusalView(
                at_unix_s=round(time.time(), 1),
                tier=uplink.tier,
                device=uplink.device,
                kind=kind.value,
                reason=f"{reason.value}: {text}"[:200],
            )
        )
        self._tell(uplink, event, kind, f"{reason.value}: {text}"[:500], batch)

    def _tell(
        self,
        uplink: Uplink,
        event: Received,
        kind: Kind,
        why: str,
        batch: ActivationBatch | AdapterMessage | None,
    ) -> None:
        """Publish a rejection, unless there were too many: they must not hold up what is worth taking."""
        now = time.monotonic()
        rejection = Rejection(
            kind=kind.value,
            reason=why,
            size_bytes=len(event.payload),
            stream=batch.stream if batch else "",
            sequence=batch.sequence if batch else 0,
        )
        topic = self._topics.rejected(uplink.tier, uplink.device)
        may = self._told.allows(topic, now) and self._all_told.allows("", now)
        if not (may and self._downlink.offer(topic, pack(rejection))):
            self._metrics.rejections_untold.inc()

    def _log(self, event: Received, kind: Kind, reason: Reason, text: str) -> None:
        self._count += 1
        if self._count <= _LOGGED:
            about = {"kind": kind.value, "reason": reason.value}
            _log.warning("refused a message on %s: %s", event.topic[:200], text, extra=about)
        if self._count == _LOGGED:
            _log.warning(
                "further refusals are counted in the metrics and partly published below rejected/, not logged"
            )
