"""Receipts as they come: what they settle in the outbox, and whether any is still to be waited for."""

from __future__ import annotations

import logging
import time

from broker_config.transport import Received
from edge_agent.session.plan_inbox import PlanInbox
from edge_agent.store.outbox import Outbox
from edge_agent.uplink.in_flight import InFlight
from edge_agent.uplink.link_state import LinkState
from edge_agent.weights.weights_inbox import WeightsInbox
from sidestream.contract.errors import StorageError, WireError
from sidestream.contract.messages import Receipt
from sidestream.contract.wire import unpack

_SETTLE_S = 10.0  # after the last receipt, so long without a newer version means that none is coming
log = logging.getLogger(__name__)


class Receipts:
    """Belongs to one thread.

    Args:
        topic: Where they come.
        outbox: What they are for.
        plans: Says whose count.
        weights: Says which version there was when one came.
        link: Told whether the trainer has room.
        in_flight: Told what need not be awaited any more.
    """

    def __init__(
        self,
        topic: str,
        outbox: Outbox,
        *,
        plans: PlanInbox,
        weights: WeightsInbox,
        link: LinkState,
        in_flight: InFlight,
    ) -> None:
        self.topic = topic
        """Where they come."""
        self._outbox = outbox
        self._plans = plans
        self._weights = weights
        self._link = link
        self._in_flight = in_flight
        self._fence = 0  # of the last one for our stream
        self._last: tuple[int, float] | None = None  # the newest version then, and when it came

    def stream_of(self, event: Received) -> str:
        """Of a receipt: the trainer tells of every stream that we had, one after the other."""
        if event.topic != self.topic or not event.payload:
            return ""
        try:
            return unpack(Receipt, event.payload).stream
        except WireError:
            return ""

    def take(self, payload: bytes) -> bool:
        """Do what a receipt says.

        Returns:
            Whether the outbox's history and the journal's have parted.

        Raises:
            DecodeError: it is none.
        """
        receipt, plan = unpack(Receipt, payload), self._plans.plan
        if self._plans.is_deposed(receipt.fence):
            return False
        if receipt.stream == self._outbox.stream:
            if self._link.trainer_online or receipt.fence > self._link.trainer_fence:
                self._fence = (
                    receipt.fence
                )  # or it is one that the broker kept, of a trainer that has gone since
            self._on_wait(receipt)
            self._on_refusal(receipt)
        try:
            ruling = plan is not None and receipt.fence == plan.fence
            settled = self._outbox.streams.receipt(receipt, ruling=ruling)
        except StorageError as exc:
            # They are sent again, receipted again, and settled once there is room to write that down.
            log.error("receipted batches cannot be settled now: %s", exc)
            return False
        if settled.returned:
            self._link.send_again()
        if settled.sequences:
            self._last = (self._weights.version, time.monotonic())
            self._in_flight.receipted(settled.sequences)
        return settled.forked

    def all_in(self) -> bool:
        """Whether everything is receipted, and the newest version has learnt from it."""
        plan = self._plans.plan
        rules = self._link.trainer_fence if self._link.trainer_online else 0
        if plan is None or self._fence < max(plan.fence, rules):
            return False  # a trainer that was started since, from a backup perhaps, may lack what it had
        if self._outbox.size()[0]:
            return False
        if self._last is None:
            return True
        version_then, receipt_s = self._last
        return self._weights.version > version_then or time.monotonic() - receipt_s > _SETTLE_S

    def _on_wait(self, receipt: Receipt) -> None:
        if receipt.wait and not self._link.waits:
            log.error(
                "the trainer has no room for what this device sends: %s. The device keeps it, and tries "
                "again now and then",
                receipt.reason,
            )
        self._link.set_waits(receipt.wait)

    def _on_refusal(self, receipt: Receipt) -> None:
        sequence = receipt.refused_sequence
        if sequence and self._outbox.refuse(receipt.stream, sequence, receipt.refused_digest):
            log.error("the trainer refused batch %d: %s", sequence, receipt.reason)
            self._link.send_again()
