"""What the trainer says: published while it may, said again later where it cannot be said now."""

from __future__ import annotations

import logging
from typing import Any, Final

from broker_config.errors import PublishTimeout, TooLarge
from metrics.catalogue import Content, TrainerMetrics
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.journal.journal import Journal
from sidestream.contract.errors import BrokerError
from sidestream.contract.messages import Receipt
from sidestream.contract.topics import Topics, Uplink
from sidestream.contract.wire import pack

_log = logging.getLogger(__name__)
_PATIENCE_S: Final = 1.0
_MOST_OWED: Final = 20_000


class Downlink:
    """Belongs to the ingest thread.

    Args:
        link: Where to.
        topics: The job's.
        journal: Says up to where a stream is safe.
        metrics: Counts bytes.
    """

    def __init__(
        self, link: LeaderTransport, topics: Topics, journal: Journal, metrics: TrainerMetrics
    ) -> None:
        self._link = link
        self._topics = topics
        self._journal = journal
        self._metrics = metrics
        self._stuck = False  # the window was full for too long: nobody waits for it until it moves
        self._too_large: set[str] = set()
        self._owed: dict[tuple[Uplink, str], dict[str, Any]] = {}

    def send(self, topic: str, payload: bytes, *, retain: bool = False, tier: str = "") -> bool:
        """Publish; what cannot be sent now is sent again after the next connection, or on the next repeat.

        It waits a second for a window that is full, and then not at all until one message has gone.

        Returns:
            Whether the broker has it, or will have.
        """
        try:
            patience_s = 0.0 if self._stuck else _PATIENCE_S
            self._link.publish(topic, payload, retain=retain, timeout_s=patience_s)
        except BrokerError as exc:
            self._stuck = isinstance(exc, PublishTimeout)
            self._not_sent(topic, exc)
            return False
        self._stuck = False
        if tier:
            self._metrics.down_bytes.labels(tier, Content.CONTROL).inc(len(payload))
        return True

    def offer(self, topic: str, payload: bytes) -> bool:
        """Publish what is of use but not needed: at once, without an acknowledgement, or not at all."""
        try:
            self._link.publish(topic, payload, qos=0, timeout_s=0.0)
        except BrokerError as exc:
            _log.debug("not sent to %s: %s", topic, exc)
            return False
        return True

    def _not_sent(self, topic: str, why: BrokerError) -> None:
        if isinstance(why, TooLarge) and topic not in self._too_large:
            self._too_large.add(topic)
            _log.error("%s cannot be published: %s", topic, why)
        else:
            _log.debug("not sent to %s: %s", topic, why)

    def pay(self) -> None:
        """Send the receipts that could not be sent, as far as they can be now."""
        while self._owed and self._link.active:
            (uplink, stream), about = next(iter(self._owed.items()))
            if not self._receipt(uplink, stream, **about):
                return
            del self._owed[uplink, stream]

    def receipt(self, uplink: Uplink, stream: str, **about: Any) -> None:
        """Tell a device what of a stream is safe, now or as soon as it can be told.

        Args:
            uplink: The device.
            stream: Of its outbox.
            about: ``retain``, if it is not to be the word that a device finds when it comes back; and more
                fields of the :class:`~sidestream.contract.messages.Receipt`.
        """
        self._owed.pop((uplink, stream), None)
        if not self._receipt(uplink, stream, **about):
            self._owed[uplink, stream] = about
            if len(self._owed) > _MOST_OWED:  # its device repeats itself
                del self._owed[next(iter(self._owed))]

    def _receipt(self, uplink: Uplink, stream: str, *, retain: bool = True, **about: Any) -> bool:
        state = self._journal.stream(stream)
        upto = state.watermark if state is not None else 0
        receipt = Receipt(
            stream=stream,
            upto=upto,
            digest=self._journal.content(stream, upto) if upto else "",
            saved=state.saved if state is not None else 0,
            fence=self._link.fence,
            **about,
        )
        topic = self._topics.receipt(uplink.tier, uplink.device)
        return self.send(topic, pack(receipt), retain=retain, tier=uplink.tier)
