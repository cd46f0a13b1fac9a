"""What has become of every batch of a split job: waiting, served, or answered by its device. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sidestream.contract.messages import (
    MAX_CHANGES,
    ActivationBatch,
    SplitPart,
    StateChange,
    states_digest,
)


class Stage(enum.IntEnum):
    """How far a batch is."""

    WAITING = 0
    """It is in the journal, and nothing was learnt from it."""
    SERVED = 1
    """The trainer has learnt from it, and its device has the gradient, or will have."""
    DONE = 2
    """What the device made of that has come, or nothing is to come."""


class Source(NamedTuple):
    """Where a batch's states are."""

    record: int
    """The one that has them whole,"""
    shape: tuple[int, ...]
    """[T, d],"""
    digest: bytes
    """what they are known by,"""
    changes: tuple[int, ...] = ()
    """and the records of what is added to them, in this order."""

    @classmethod
    def whole(cls, record: int, batch: ActivationBatch) -> Source:
        """Of a batch that came with them."""
        tensor = batch.activations
        return cls(record, tensor.shape[1:], states_digest([tensor]))

    def changed(self, record: int, change: StateChange) -> Source | None:
        """With a record's change; None if that is one of other states, or there are too many."""
        fits = change.base == self.digest and change.tensor.shape == self.shape
        if not fits or len(self.changes) >= MAX_CHANGES:
            return None
        digest = states_digest([change.tensor], self.digest)
        return self._replace(digest=digest, changes=(*self.changes, record))


@dataclass(slots=True)
class Ticket:
    """One batch."""

    offset: int
    """Its record."""
    source: Source
    """Where its activations are: in its own record, or in an earlier batch's that stands for it."""
    tier: str
    """Of its device."""
    device: str
    """Whose it is."""
    stream: str
    """Of the device's outbox,"""
    sequence: int
    """and the batch's place there."""
    part: SplitPart
    """What it said of itself."""
    stage: Stage = Stage.WAITING
    served: int = 0
    """How many batches had been served with it."""


class Tickets:
    """Every batch, by its device and its ticket."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bytes], Ticket] = {}
        self._waiting: dict[int, Ticket] = {}
        self._open: dict[tuple[str, bytes], Ticket] = {}  # served, and not answered
        self._answered: set[tuple[str, bytes]] = set()  # before they were served: the journal was set back
        self._streams: dict[str, str] = {}  # by device, the one that it sent in last
        self.served = 0
        """Batches that were learnt from."""

    def get(self, device: str, ticket: bytes) -> Ticket | None:
        """A batch, if it has come."""
        return self._known.get((device, ticket))

    def heard(self, device: str, stream: str) -> None:
        """A device has sent something in this stream."""
        self._streams[device] = stream

    def is_current(self, ticket: Ticket) -> bool:
        """Whether its device still sends in the stream that the batch came in.

        One that has begun another sends in it once more whatever it waits for.
        """
        return self._streams.get(ticket.device) == ticket.stream

    @property
    def waiting(self) -> Mapping[int, Ticket]:
        """Batches that nothing was learnt from, by their records, in the order of their coming."""
        return self._waiting

    def arrived(self, ticket: Ticket) -> None:
        """A batch has come; of two with one ticket, which no honest device sends, the first counts."""
        key = ticket.device, ticket.part.ticket
        if key not in self._known:
            self._known[key] = self._waiting[ticket.offset] = ticket

    def serve(self, offsets: Iterable[int]) -> list[Ticket]:
        """These are learnt from now, in this order.

        Raises:
            KeyError: one does not wait.
        """
        found = [self._waiting.pop(offset) for offset in offsets]
        for one in found:
            self.served += 1
            one.served = self.served
            key = one.device, one.part.ticket
            one.stage = Stage.DONE if key in self._answered else Stage.SERVED
            if one.stage is Stage.SERVED:
                self._open[key] = one
        return found

    def open_of(self, device: str) -> list[Ticket]:
        """A device's batches that were served and not answered."""
        return [one for (owner, _), one in self._open.items() if owner == device]

    def answer(self, device: str, ticket: bytes) -> bool:
        """What a device made of a batch has come; return whether for the first time."""
        key = device, ticket
        known = self._known.get(key)
        if known is None or known.stage is Stage.WAITING:
            before = key in self._answered
            self._answered.add(key)
            return not before
        self._open.pop(key, None)
        before, known.stage = known.stage is Stage.DONE, Stage.DONE
        return not before
