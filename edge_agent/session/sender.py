"""From the outbox to the broker: in order, within the window, again after a reconnect or a silence.

Deletes nothing: the outbox does, on a receipt. A broker's acknowledgement means nothing here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from broker_config.errors import NotConnected, PublishTimeout, TooLarge
from broker_config.transport import Transport
from edge_agent.store.budget import LinkBudget
from edge_agent.store.outbox import Outbox
from edge_agent.store.recut import recut
from edge_agent.store.streams import Waiting
from metrics.catalogue import AgentMetrics
from sidestream.contract.errors import BrokerError, StorageError
from sidestream.contract.messages import ActivationBatch, Flow
from sidestream.contract.wire import unpack
from sidestream.host.trace import Trace

_IDLE_S = 0.5
_ASK_AGAIN = 6.0  # times retry_s: how often a device that was told to wait tries one batch
_LATER_BYTES = 64  # by which a part may grow with its sequence number and floor
log = logging.getLogger(__name__)


class Sender:
    """Publishes waiting batches. :meth:`run` belongs to one thread; the rest may be called from any.

    Args:
        outbox: What to send.
        transport: Where to.
        topic: On what topic.
        flow: The window, and whether to pause.
        retry_s: Send unreceipted batches again when none of them was receipted for so long.
        metrics: Told how long receipts take.
        trace: Told what is done when.
        link: Says when the next batch may go, if the device has a budget for its link.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        outbox: Outbox,
        transport: Transport,
        topic: str,
        *,
        flow: Flow,
        retry_s: float,
        metrics: AgentMetrics,
        trace: Trace,
        link: LinkBudget | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outbox = outbox
        self._transport = transport
        self._topic = topic
        self._flow = flow
        self._retry_s = retry_s
        self._metrics = metrics
        self._trace = trace
        self._link = link
        self._clock = clock
        self._first_sent: dict[int, tuple[float, int]] = {}  # by clock, and for the trace
        self._last_sent = 0  # everything up to here is on its way, or receipted
        self._idle_s = _IDLE_S
        self._news_s = clock()  # when something last moved: a publish after idling, or a receipt
        self._connected = False
        self._waits = False  # the trainer has no room for us
        self._too_large_s: float | None = None  # since when this connection is known not to carry some batch
        self._unanswered_s: float | None = None  # since when something is sent and nothing receipted
        self._stopped = False
        self._changed = threading.Condition()

    def connection(self, up: bool) -> None:
        """The connection came up or went down; what was under way before may be lost."""
        with self._changed:
            self._connected, self._unanswered_s, self._too_large_s = up, None, None
            self._restart()
            self._changed.notify()

    def set_flow(self, flow: Flow) -> None:
        """The trainer changed the rate."""
        with self._changed:
            self._flow, self._unanswered_s = flow, None
            self._changed.notify()

    @property
    def unanswered_s(self) -> float:
        """For how long batches have been sent without any receipt; 0 if all is well, or none may be sent."""
        since_s = self._unanswered_s
        return 0.0 if since_s is None else self._clock() - since_s

    def set_waits(self, waits: bool) -> None:
        """The trainer has no room for what this device sends, or has some again."""
        with self._changed:
            if waits != self._waits:
                self._waits, self._unanswered_s = waits, None
                self._restart()
                self._changed.notify()

    def wake(self) -> None:
        """There is a new batch."""
        with self._changed:
            self._changed.notify()

    def receipted(self, sequences: Sequence[int]) -> None:
        """These batches have left the outbox on a receipt: there is room in the window."""
        with self._changed:
            self._news_s, self._unanswered_s = self._clock(), None
            for sequence in sequences:
                if (sent := self._first_sent.pop(sequence, None)) is not None:
                    self._metrics.receipt_seconds.observe(self._news_s - sent[0])
                    # No more than a window is under way, so a lane is free again when its turn comes.
                    lane = f"in flight {1 + sequence % (self._flow.window + 1)}"
                    self._trace.add("await receipt", lane, sent[1], batch=sequence)
            # Of batches that were given up on the way there is no receipt.
            for sequence in [sent for sent in self._first_sent if sequences and sent < sequences[-1]]:
                del self._first_sent[sequence]
            self._changed.notify()

    def send_again(self) -> None:
        """Repeat what is under way, with today's floor: a batch before it was given up."""
        with self._changed:
            self._restart()
            self._changed.notify()

    def stop(self) -> None:
        """Make :meth:`run` return soon."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        """Send until stopped.

        Raises:
            BrokerError: the broker will never take a batch of this size.
        """
        while not self._stopped:
            if self.send_next():
                continue
            with self._changed:
                if not self._stopped:
                    self._changed.wait(self._idle_s)

    def send_next(self) -> bool:
        """Send one batch, if there is one that may be sent now; whether there was.

        Raises:
            BrokerError: the broker will never take a batch of this size.
        """
        batch = self._next()
        if batch is not None:
            self._publish(batch)
        return batch is not None

    def _next(self) -> Waiting | None:
        """The next batch that may be sent now."""
        with self._changed:
            self._idle_s = _IDLE_S
            if not self._connected or self._flow.pause:
                return None
            if self._link is not None and (left_s := self._link.wait_s()) > 0:
                self._idle_s = min(_IDLE_S, left_s)
                return None
            if self._waits and not self._may_ask():
                return None
            first = self._outbox.first_waiting
            under_way = self._last_sent >= first
            if under_way and self._clock() - self._news_s > self._retry_s:
                log.info("no receipt for %.0f s: sending from batch %d again", self._retry_s, first)
                self._restart()
            if self._last_sent - first + 1 >= (1 if self._waits else self._flow.window):
                return None
            if not under_way:
                self._news_s = self._clock()
            waiting = self._outbox.pending(max(self._last_sent, first - 1), 1)
            return waiting[0] if waiting else None

    def _may_ask(self) -> bool:
        """Whether it is time to see whether the trainer has room again, with the oldest batch."""
        if self._clock() - self._news_s <= _ASK_AGAIN * self._retry_s:
            return False
        self._restart()
        return True

    def _restart(self) -> None:
        self._last_sent = 0
        self._news_s = self._clock()

    def _publish(self, batch: Waiting) -> None:
        payload = batch.payload
        with self._changed:
            self._last_sent = batch.sequence  # before it is sent: a reconnect meanwhile sets it back
            started = self._trace.now()
            self._first_sent.setdefault(batch.sequence, (self._clock(), started))
        try:
            self._transport.publish(self._topic, payload, qos=1)
        except (NotConnected, PublishTimeout) as exc:
            log.debug("batch %d was not sent: %s", batch.sequence, exc)
            with self._changed:
                self._last_sent = min(self._last_sent, batch.sequence - 1)
                if not self._stopped:
                    self._changed.wait(_IDLE_S)
            return
        except TooLarge as exc:
            self._on_too_large(batch, exc)
            return
        self._trace.add("publish", "send", started, batch=batch.sequence, bytes=len(payload))
        with self._changed:
            if self._unanswered_s is None and not self._waits:
                self._unanswered_s = self._clock()
        if self._link is not None:
            self._link.spent(len(payload))
        self._outbox.count("batches_sent", 1)
        self._outbox.count("bytes_up", len(payload))

    def _on_too_large(self, batch: Waiting, why: TooLarge) -> None:
        """Cut a batch that this connection can never carry, and that no earlier one carried, it seems.

        The trainer's word that it has the batch is retained: in ``retry_s`` it would have come.

        Raises:
            BrokerError: it is one row and cannot be cut.
        """
        message = unpack(ActivationBatch, batch.payload)
        if len(message.sample_ids) == 1:
            raise BrokerError(f"batch {batch.sequence} cannot be sent: {why}") from why
        with self._changed:
            self._last_sent = min(self._last_sent, batch.sequence - 1)
            now = self._clock()
            self._too_large_s = now if self._too_large_s is None else self._too_large_s
            if now - self._too_large_s < self._retry_s:
                self._changed.wait(min(_IDLE_S, self._retry_s))
                return
        room = why.limit - (why.size - len(batch.payload)) - _LATER_BYTES
        parts = list(recut(message, room))
        try:
            self._outbox.replace(batch.sequence, parts)
        except StorageError as exc:
            log.error("batch %d, too large for the broker, cannot be cut now: %s", batch.sequence, exc)
            return
        log.warning(
            "batch %d has %d bytes, and the broker takes %d: it is cut into %d batches and goes last",
            *(batch.sequence, why.size, why.limit, len(parts)),
        )
