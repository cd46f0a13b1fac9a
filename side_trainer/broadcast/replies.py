"""Answers to single batches: written down, published to the slot of the device's own, again after a break.

A retained message a slot: who reconnects finds what it has not dealt with. A message stays until another one
takes its slot, or nobody has wanted it for so long that its device is taken for gone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from metrics.catalogue import Content, TrainerMetrics
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.journal.journal import Journal
from side_trainer.journal.replies import StoredReply
from side_trainer.method import Reply
from sidestream.contract.errors import BrokerError
from sidestream.contract.messages import GradientReply
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack, unpack
from sidestream.host.trace import Trace

_log = logging.getLogger(__name__)
_LOOK_EVERY_S: Final = 60.0
_RETRY_S: Final = 1.0
_Place = tuple[str, str, int]


class Replies:
    """Belongs to the learner's thread, :meth:`again` and :attr:`awaited` apart.

    Args:
        journal: Where they are written down.
        link: Where to.
        topics: The job's.
        signer: Signs them.
        metrics: Counts them.
        trace: Told what is done when.
        keep_s: How long a message waits for its device.
        patience_s: For how long one holds up the version that is final.
        clock: Unix time.
    """

    def __init__(
        self,
        journal: Journal,
        link: LeaderTransport,
        topics: Topics,
        signer: TrainerSigner,
        metrics: TrainerMetrics,
        trace: Trace,
        *,
        keep_s: float,
        patience_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._link = link
        self._topics = topics
        self._signer = signer
        self._metrics = metrics
        self._trace = trace
        self._keep_s = keep_s
        self._patience_s = patience_s
        self._clock = clock
        self._kept: dict[_Place, StoredReply] = {_place(one): one for one in journal.replies.all()}
        self._awaited = {place for place, one in self._kept.items() if _awaits(one)}
        self._unsent: dict[_Place, None] = dict.fromkeys(self._kept)
        self._again = False
        self._made: list[StoredReply] = []  # not written down yet
        self._looked_s = self._tried_s = 0.0

    @property
    def outstanding(self) -> int:
        """Answers that devices have not answered in turn."""
        return len(self._awaited)

    @property
    def awaited(self) -> bool:
        """Whether a device is likely to answer one of them soon."""
        now = self._clock()
        found = (self._kept.get(place) for place in list(self._awaited))
        return any(one is not None and now - one.since < self._patience_s for one in found)

    def again(self) -> None:
        """There is a fresh connection; for any thread."""
        self._again = True

    @property
    def all_written(self) -> bool:
        """Whether a fold that goes on from here would miss none."""
        return not self._made

    def put(self, replies: Sequence[Reply]) -> None:
        """Take in what a record gave, to be written down."""
        self._made += [self._stored(one) for one in replies]

    def write(self) -> None:
        """Write down what was taken in, so that it may be published.

        Raises:
            StorageError: it cannot be written now; it is kept.
        """
        if not self._made:
            return
        kept = dict(self._kept)
        for one in self._made:
            if self._fits(one, kept.get(_place(one))):
                kept[_place(one)] = one
        changed = [one for place, one in kept.items() if self._kept.get(place) is not one]
        self._journal.replies.put(changed)
        for one in changed:
            place = _place(one)
            self._kept[place] = one
            self._unsent[place] = None
            (self._awaited.add if _awaits(one) else self._awaited.discard)(place)
        self._made = []
        self._metrics.replies_outstanding.set(self.outstanding)

    def publish(self) -> None:
        """Publish what has not been, as far as it can be now; forget what is too old."""
        if self._again:
            self._again = False
            self._unsent = dict.fromkeys(self._kept)
        self._expire()
        while self._unsent and self._link.active and time.monotonic() >= self._tried_s:
            place = next(iter(self._unsent))
            if not self._send(self._kept[place]):
                self._tried_s = time.monotonic() + _RETRY_S
                return
            del self._unsent[place]

    @staticmethod
    def _fits(one: StoredReply, before: StoredReply | None) -> bool:
        """Whether it may stand in its slot.

        A device gives a slot to another batch once it has dealt with the one before: of an earlier one
        nothing is news any more. That comes late where messages do, or are sent again to a journal that was
        set back.
        """
        if before is None or before.ticket == one.ticket:
            return True
        if one.stream == before.stream and one.sequence < before.sequence:
            return False
        return not unpack(GradientReply, one.payload).applied

    def _send(self, one: StoredReply) -> bool:
        payload = one.payload
        if payload:
            payload = self._signer.reply(unpack(GradientReply, payload), one.tier, one.device)
        topic, began = self._topics.gradient(one.tier, one.device, one.slot), self._trace.now()
        try:
            self._link.publish(topic, payload, retain=True)
        except BrokerError as exc:
            _log.debug("not sent to %s: %s", topic, exc)
            return False
        self._trace.add("answer", "learner", began, device=one.device, batch=one.sequence, bytes=len(payload))
        self._metrics.down_bytes.labels(one.tier, Content.GRADIENT).inc(len(payload))
        return True

    def _stored(self, reply: Reply) -> StoredReply:
        state = self._journal.stream(reply.stream)
        assert state is not None
        base, message = self._journal.version_base, reply.message
        message = msgspec.structs.replace(
            message,
            version=message.version and base + message.version,
            applied=message.applied and base + message.applied,
        )
        return StoredReply(
            tier=reply.tier,
            device=state.device,
            slot=reply.slot,
            ticket=message.ticket,
            stream=reply.stream,
            sequence=reply.sequence,
            payload=pack(message),
            since=self._clock(),
        )

    def _expire(self) -> None:
        """Take what nobody has wanted for so long off the broker."""
        now = self._clock()
        if now - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now
        old = [one for one in self._kept.values() if now - one.since > self._keep_s]
        if not old or not self._link.active:
            return
        gone = [one for one in old if self._send(one._replace(payload=b""))]
        self._journal.replies.remove(gone)
        for one in gone:
            place = _place(one)
            self._metrics.replies_expired.inc(place in self._awaited)
            self._forget(place)

    def _forget(self, place: _Place) -> None:
        self._kept.pop(place, None)
        self._unsent.pop(place, None)
        self._awaited.discard(place)
        self._metrics.replies_outstanding.set(self.outstanding)


def _place(one: StoredReply) -> _Place:
    return one.tier, one.device, one.slot


def _awaits(one: StoredReply) -> bool:
    return unpack(GradientReply, one.payload).gradient is not None
