"""What the trainer says: published while it may, said again later where it cannot be said now."""

from __future__ import annotations

import logging
from typing import Any

from contract.errors import BrokerError
from contract.messages import Receipt
from contract.topics import Topics
from contract.wire import pack
from metrics.catalogue import Content, TrainerMetrics
from side_trainer.gate import Gate
from side_trainer.journal import Journal
from side_trainer.standing import Standing

_log = logging.getLogger(__name__)


class Downlink:
    """Belongs to the ingest thread.

    Args:
        transport: Where to.
        topics: The job's.
        journal: Says up to where a stream is safe.
        standing: Has the fence.
        metrics: Counts bytes.
    """

    def __init__(
        self,
        transport: Gate,
        topics: Topics,
        journal: Journal,
        standing: Standing,
        metrics: TrainerMetrics,
    ) -> None:
        self._transport = transport
        self._topics = topics
        self._journal = journal
        self._standing = standing
        self._metrics = metrics

    def send(self, topic: str, payload: bytes, *, retain: bool = False, tier: str = "") -> bool:
        """Publish; what cannot be sent now is sent again after the next connection, or on the next repeat.

        Returns:
            Whether the broker has it, or will have.
        """
        try:
            self._transport.publish(topic, payload, retain=retain)
        except BrokerError as exc:
            _log.debug("not sent to %s: %s", topic, exc)
            return False
        if tier:
            self._metrics.down_bytes.labels(tier, Content.CONTROL).inc(len(payload))
        return True

    def receipt(self, tier: str, device: str, stream: str, *, retain: bool = True, **about: Any) -> None:
        """Tell a device what of a stream is safe.

        Args:
            tier: Of the device,
            device: and its id.
            stream: Of its outbox.
            retain: Whether it is the word that a device finds when it comes back.
            about: More fields of the :class:`~contract.messages.Receipt`.
        """
        state = self._journal.stream(stream)
        upto = state.watermark if state is not None else 0
        receipt = Receipt(
            stream=stream,
            upto=upto,
            digest=self._journal.content(stream, upto) if upto else "",
            saved=state.saved if state is not None else 0,
            fence=self._standing.fence,
            **about,
        )
        self.send(self._topics.receipt(tier, device), pack(receipt), retain=retain, tier=tier)
