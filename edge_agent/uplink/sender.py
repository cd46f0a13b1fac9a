"""From the outbox to the broker: in order, within the window, again after a reconnect or a silence.

Deletes nothing: the outbox does, on a receipt. A broker's acknowledgement means nothing here. Never waits for
long: its thread is the one that hears the network.
"""

from __future__ import annotations

import logging
import time

from broker_config.errors import NotConnected, PublishTimeout, TooLarge
from broker_config.transport import Transport
from edge_agent.store.outbox import Outbox
from edge_agent.store.streams import Waiting, read_sent
from edge_agent.uplink.budget import LinkBudget
from edge_agent.uplink.in_flight import InFlight
from edge_agent.uplink.link_state import LinkState
from edge_agent.uplink.recut import recut
from sidestream.contract.errors import BrokerError, StorageError
from sidestream.contract.messages import ActivationBatch, is_adapter_message
from sidestream.host.trace import Trace

_PUBLISH_S = 0.1  # to wait for the connection's window
_ASK_AGAIN = 6.0  # times retry_s: how often a device that was told to wait tries one batch
_LATER_BYTES = 64  # by which a part may grow with its sequence number and floor
log = logging.getLogger(__name__)


class Sender:
    """Publishes waiting batches. Belongs to one thread.

    Args:
        outbox: What to send.
        transport: Where to.
        topic: Of activations,
        adapter_topic: and of what else goes into the outbox of a split job.
        link: Whether and how fast.
        in_flight: Told what is sent.
        trace: Told what is done when.
        budget: Says when the next batch may go, if the device has a budget for its link.
    """

    def __init__(
        self,
        outbox: Outbox,
        transport: Transport,
        topic: str,
        adapter_topic: str,
        *,
        link: LinkState,
        in_flight: InFlight,
        trace: Trace,
        budget: LinkBudget | None = None,
    ) -> None:
        self._outbox = outbox
        self._transport = transport
        self._topic = topic
        self._adapter_topic = adapter_topic
        self._link = link
        self._in_flight = in_flight
        self._trace = trace
        self._budget = budget
        self._too_large_s: float | None = None  # since when this connection is known not to carry some batch

    @property
    def due_s(self) -> float:
        """Seconds until the budget lets the next batch go."""
        return self._budget.wait_s() if self._budget is not None else 0.0

    def send_next(self) -> bool:
        """Send one batch, if there is one that may be sent now; whether another may follow at once.

        Raises:
            BrokerError: the broker will never take a batch of this size.
        """
        batch = self._next()
        return batch is not None and self._publish(batch)

    def _next(self) -> Waiting | None:
        """The next batch that may be sent now."""
        link, in_flight = self._link, self._in_flight
        if in_flight.heed_breaks():
            self._too_large_s = None
        if not link.begun or not self._may_send() or not (link.news or in_flight.under_way):
            return None
        assert link.flow is not None
        link.news = False
        first = self._outbox.streams.first_waiting()
        under_way = in_flight.last >= first
        if under_way and in_flight.silent_s > link.retry_s:
            log.info("no receipt for %.0f s: sending from batch %d again", link.retry_s, first)
            in_flight.restart()
        if in_flight.last - first + 1 >= (1 if link.waits else link.flow.window):
            link.news = True
            return None
        if not under_way:
            in_flight.moved()
        waiting = self._outbox.streams.waiting(max(in_flight.last, first - 1), 1)
        link.news |= bool(waiting)
        return waiting[0] if waiting else None

    def _may_send(self) -> bool:
        link, in_flight = self._link, self._in_flight
        if link.flow is not None and link.flow.pause:
            in_flight.not_awaited()
            return False
        if not link.connected or self.due_s > 0:
            return False
        if link.waits:  # see now and then whether the trainer has room again, with the oldest batch
            if in_flight.silent_s <= _ASK_AGAIN * link.retry_s:
                return False
            in_flight.restart()
        return True

    def _publish(self, batch: Waiting) -> bool:
        payload, in_flight = batch.payload, self._in_flight
        started = self._trace.now()
        in_flight.begin(batch.sequence, started)
        try:
            topic = self._adapter_topic if is_adapter_message(payload) else self._topic
            self._transport.publish(topic, payload, qos=1, timeout_s=_PUBLISH_S)
        except (NotConnected, PublishTimeout) as exc:
            log.debug("batch %d was not sent: %s", batch.sequence, exc)
            in_flight.failed(batch.sequence)
            return False
        except TooLarge as exc:
            return self._on_too_large(batch, exc)
        self._trace.add("publish", "send", started, batch=batch.sequence, bytes=len(payload))
        in_flight.published()
        if self._budget is not None:
            self._budget.spent(len(payload))
        self._outbox.count("batches_sent", 1)
        self._outbox.count("bytes_up", len(payload))
        return True

    def _on_too_large(self, batch: Waiting, why: TooLarge) -> bool:
        """Cut a batch that this connection can never carry, and that no earlier one carried, it seems.

        Returns:
            Whether another one may be sent at once.

        The trainer's word that it has the batch is retained: in ``retry_s`` it would have come.

        Raises:
            BrokerError: it is one row and cannot be cut.
        """
        message = read_sent(batch.payload)
        if not isinstance(message, ActivationBatch) or not _divisible(message):
            raise BrokerError(f"batch {batch.sequence} cannot be sent: {why}") from why
        self._in_flight.failed(batch.sequence)
        now, patience_s = time.monotonic(), self._link.retry_s
        self._too_large_s = now if self._too_large_s is None else self._too_large_s
        if now - self._too_large_s < patience_s:
            return False
        room = why.limit - (why.size - len(batch.payload)) - _LATER_BYTES
        parts = list(recut(message, room))
        try:
            self._outbox.replace(batch.sequence, parts)
        except StorageError as exc:
            log.error("batch %d, too large for the broker, cannot be cut now: %s", batch.sequence, exc)
            return False
        log.warning(
            "batch %d has %d bytes, and the broker takes %d: it is cut into %d batches and goes last",
            *(batch.sequence, why.size, why.limit, len(parts)),
        )
        return True


def _divisible(batch: ActivationBatch) -> bool:
    """Whether it can be cut: a batch that is answered is answered as it was made."""
    return len(batch.sample_ids) > 1 and batch.part is None
