"""The streams of an outbox: what of them is journaled, and what is done when two histories have parted.

A stream is a chain. Every batch names the one before it by its content, so the content of a batch stands for
all that came before it, and a receipt, which names the last batch that it speaks for, proves all of them.
Where it names another one than stands here, the outbox was set back to an earlier state, or two devices have
gone on from a copy of it. Then a **new stream** begins, and what is not proved to be journaled goes into it;
the trainer knows each sample by its key, and takes it once in whatever stream it comes.

What is receipted is kept for a while all the same: if the trainer's journal is set back to a backup, its
receipts fall behind those that were given before, and what they no longer speak for is sent again.

Within transactions of whoever holds the file. Knows no network.
"""

from __future__ import annotations

import enum
import logging
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np

from edge_agent.store.outbox_file import OutboxFile
from sidestream.contract.messages import (
    MAX_STREAMS,
    ActivationBatch,
    AdapterMessage,
    Receipt,
    content_digest,
    is_adapter_message,
    to_bin,
    unpack_adapter,
    with_floor,
)
from sidestream.contract.wire import pack, unpack

log = logging.getLogger(__name__)


class BatchState(enum.IntEnum):
    """What became of a batch. Its row stays in any case: receipts of whatever age are held against it."""

    WAITING = 0
    """For a receipt."""
    KEPT = 1
    """Receipted; its payload is still here."""
    TRIMMED = 2
    """Receipted; its payload is gone."""
    GIVEN_UP = 3
    """Dropped, refused, or gone into another stream."""


class Slot(NamedTuple):
    """A batch's place in the stream; its payload carries all of it."""

    stream: str
    sequence: int
    floor: int
    first_sample: int
    """Ordinal number of its first sample; the others follow."""
    previous: str
    """The content digest of the batch before it."""


class Waiting(NamedTuple):
    """A batch in the outbox."""

    sequence: int
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What a receipt did."""

    sequences: tuple[int, ...] = ()
    """Batches that need not be sent any more."""
    returned: int = 0
    """Receipted batches that wait again, for the journal was set back."""
    forked: bool = False
    """Whether a new stream has begun."""


class _Stream(NamedTuple):
    id: int
    name: str
    next_sequence: int
    next_sample: int
    head: str
    gone: int
    receipted: int
    fence: int


class Streams:
    """The tables ``streams`` and ``batches`` of an outbox's file.

    Args:
        file: The outbox's.
        keep_bytes: Receipted batches take up so many bytes at most.
    """

    def __init__(self, file: OutboxFile, keep_bytes: int) -> None:
        self._file = file
        self._keep_bytes = keep_bytes

    # --- looking -----------------------------------------------------------------------------------------

    @property
    def current(self) -> _Stream:
        """The stream that new batches go into."""
        with self._file.reading() as db:
            row = db.execute("SELECT * FROM streams ORDER BY id DESC LIMIT 1").fetchone()
            if row is None:
                raise sqlite3.DatabaseError("it has no stream")
            return _Stream(*row)

    @property
    def empty(self) -> bool:
        """Whether nothing was ever made."""
        with self._file.reading() as db:
            return db.execute("SELECT max(next_sequence) FROM streams").fetchone()[0] in (None, 1)

    def earlier(self) -> tuple[str, ...]:
        """Names of the streams before the current one of which anything was receipted, the newest ones."""
        query = "SELECT name FROM streams WHERE id < ? AND receipted > 0 ORDER BY id DESC LIMIT ?"
        with self._file.reading() as db:
            return tuple(name for (name,) in db.execute(query, (self.current.id, MAX_STREAMS)))

    def first_waiting(self) -> int:
        """The lowest sequence still waiting; if none is, the next one to be made."""
        current = self.current
        with self._file.reading() as db:
            lowest = db.execute(
                "SELECT min(sequence) FROM batches WHERE state = ? AND stream = ?",
                (BatchState.WAITING, current.id),
            ).fetchone()[0]
        return current.next_sequence if lowest is None else int(lowest)

    @property
    def floor(self) -> int:
        """Every sequence before it was receipted or given up, and is not asked for again."""
        return min(self.first_waiting(), self.current.gone + 1)

    def waiting(self, after: int, limit: int) -> list[Waiting]:
        """Up to ``limit`` waiting batches with sequences over ``after``, in order, with today's floor."""
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT sequence, floor, payload FROM batches "
                "WHERE state = ? AND stream = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                (BatchState.WAITING, self.current.id, after, limit),
            ).fetchall()
            floor = self.floor
        return [
            Waiting(sequence, payload if made_with == floor else with_floor(payload, floor))
            for sequence, made_with, payload in rows
        ]

    def size(self, state: BatchState) -> tuple[int, int]:
        """Batches in a state, and their bytes."""
        with self._file.reading() as db:
            count, total = db.execute(
                "SELECT count(*), sum(bytes) FROM batches WHERE state = ?", (state,)
            ).fetchone()
        return count, total or 0

    def is_waiting(self, stream: str, sequence: int, digest: str) -> bool:
        """Whether that very batch waits."""
        query = (
            "SELECT 1 FROM batches b JOIN streams s ON s.id = b.stream "
            "WHERE s.name = ? AND sequence = ? AND digest = ? AND state = ?"
        )
        with self._file.reading() as db:
            return db.execute(query, (stream, sequence, digest, BatchState.WAITING)).fetchone() is not None

    # --- changing, within a transaction ------------------------------------------------------------------

    def begin(self, db: sqlite3.Connection) -> None:
        """Begin a new stream."""
        db.execute("INSERT INTO streams (name) VALUES (?)", (secrets.token_hex(16),))

    def append(self, db: sqlite3.Connection, pack: Callable[[Slot], bytes], samples: int) -> int:
        """Add a batch to the current stream; return its sequence."""
        stream = self.current
        slot = Slot(stream.name, stream.next_sequence, self.floor, stream.next_sample, stream.head)
        payload = pack(slot)
        digest = content_digest(payload)
        db.execute(
            "INSERT INTO batches (stream, sequence, floor, samples, digest, state, bytes, payload) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (stream.id, *slot[1:3], samples, digest, BatchState.WAITING, len(payload), payload),
        )
        db.execute(
            "UPDATE streams SET next_sequence = ?, next_sample = ?, head = ? WHERE id = ?",
            (slot.sequence + 1, slot.first_sample + samples, digest, stream.id),
        )
        return slot.sequence

    def give_up(self, db: sqlite3.Connection, sequence: int) -> int:
        """Let a batch of the current stream go, though it was not receipted; return its samples."""
        stream = self.current.id
        found = db.execute(
            "SELECT number, samples FROM batches WHERE stream = ? AND sequence = ? AND state = ?",
            (stream, sequence, BatchState.WAITING),
        ).fetchone()
        if found is None:
            return 0
        _empty(db, found[0], BatchState.GIVEN_UP)
        db.execute("UPDATE streams SET gone = max(gone, ?) WHERE id = ?", (sequence, stream))
        return int(found[1])

    def keep_within(self, db: sqlite3.Connection, most_bytes: int) -> None:
        """Let receipted batches go, the oldest first, until they take no more than this, or their share."""
        total = self.size(BatchState.KEPT)[1]
        most_bytes = max(0, min(most_bytes, self._keep_bytes))
        while total > most_bytes:
            number, size = db.execute(
                "SELECT number, bytes FROM batches WHERE state = ? ORDER BY number LIMIT 1",
                (BatchState.KEPT,),
            ).fetchone()
            _empty(db, number, BatchState.TRIMMED)
            total -= size

    # --- receipts ----------------------------------------------------------------------------------------

    def receipt(self, receipt: Receipt, *, ruling: bool = False) -> Settled:
        """Do what a receipt says, as far as it speaks of what is here.

        Args:
            receipt: As it came.
            ruling: It is of the very trainer whose plan is in force. Its fence may be lower than one before:
                that of a journal that was set back, on a machine whose clock is behind.
        """
        with self._file.lock:
            stream = self._find(receipt.stream)
            if stream is None or (receipt.fence < stream.fence and not ruling):
                return Settled()
            if receipt.forked_sequence and not self._is_waiting(stream, receipt):
                return Settled()  # it has gone into another stream already
            if receipt.forked_sequence or self._has_parted(stream, receipt):
                return Settled(forked=stream.id == self.current.id and self.fork())
            with self._file.transaction() as db:
                settled = self._settle(db, stream, receipt)
            self._gather()
            return settled

    def fork(self) -> bool:
        """Go on with a new stream, into which everything that waits is moved."""
        with self._file.transaction() as db:
            self.begin(db)
            # Counters are told with the stream that they belong to; what was before was told with the other.
            self._file.restart_counters()
            self._file.add("streams_forked", 1)
        moved = self._gather()
        log.warning(
            "the history of this outbox and that of the trainer's journal have parted: %s was restored from "
            "an older copy, or another device goes on from a copy of it. A new stream begins; %d batches "
            "that are not proved to be journaled go into it. Nothing is lost, and no sample counts twice",
            *(self._file.path.parent, moved),
        )
        return True

    def mend(self) -> None:
        """Finish what a crash has left half done."""
        self._gather()

    def _find(self, name: str) -> _Stream | None:
        with self._file.reading() as db:
            row = db.execute("SELECT * FROM streams WHERE name = ?", (name,)).fetchone()
        return _Stream(*row) if row is not None else None

    def _has_parted(self, stream: _Stream, receipt: Receipt) -> bool:
        """Whether a receipt is for another history than the one that is here."""
        if receipt.upto >= stream.next_sequence:
            return True
        with self._file.reading() as db:
            row = db.execute(
                "SELECT digest, state FROM batches WHERE stream = ? AND sequence = ?",
                (stream.id, receipt.upto),
            ).fetchone()
        if row is None:  # the receipt is for nothing yet
            return False
        digest, state = row
        # Of what was given up the journal may have nothing.
        return digest != receipt.digest and bool(receipt.digest or state != BatchState.GIVEN_UP)

    def _is_waiting(self, stream: _Stream, receipt: Receipt) -> bool:
        return self.is_waiting(stream.name, receipt.forked_sequence, receipt.forked_digest)

    def _settle(self, db: sqlite3.Connection, stream: _Stream, receipt: Receipt) -> Settled:
        returned = 0
        # Only a trainer that was started anew can know less than the one before it.
        if receipt.fence != stream.fence and receipt.upto < stream.receipted:
            returned = self._take_back(db, stream, receipt.upto)
            stream = stream._replace(receipted=receipt.upto)
        done = db.execute(
            "SELECT sequence FROM batches WHERE state = ? AND stream = ? AND sequence <= ? ORDER BY sequence",
            (BatchState.WAITING, stream.id, receipt.upto),
        ).fetchall()
        db.execute(
            "UPDATE batches SET state = ? WHERE state = ? AND stream = ? AND sequence <= ?",
            (BatchState.KEPT, BatchState.WAITING, stream.id, receipt.upto),
        )
        db.execute(
            "UPDATE batches SET state = ?, bytes = 0, payload = x'' "
            "WHERE state = ? AND stream = ? AND sequence <= ?",
            (BatchState.TRIMMED, BatchState.KEPT, stream.id, min(receipt.saved, receipt.upto)),
        )
        self.keep_within(db, self._keep_bytes)
        db.execute(
            "UPDATE streams SET receipted = ?, fence = ? WHERE id = ?",
            (max(stream.receipted, receipt.upto), receipt.fence, stream.id),
        )
        sequences = tuple(sequence for (sequence,) in done) if stream.id == self.current.id else ()
        return Settled(sequences=sequences, returned=returned)

    def _take_back(self, db: sqlite3.Connection, stream: _Stream, upto: int) -> int:
        """The journal was set back: have wait again what it lacks; return how many do."""
        after = "state = ? AND stream = ? AND sequence > ?"
        lost, last = db.execute(
            f"SELECT coalesce(sum(samples), 0), coalesce(max(sequence), 0) FROM batches WHERE {after}",
            (BatchState.TRIMMED, stream.id, upto),
        ).fetchone()
        db.execute(
            f"UPDATE batches SET state = ? WHERE {after}",
            (BatchState.GIVEN_UP, BatchState.TRIMMED, stream.id, upto),
        )
        db.execute("UPDATE streams SET gone = max(gone, ?) WHERE id = ?", (last, stream.id))
        returned = db.execute(
            f"UPDATE batches SET state = ? WHERE {after}",
            (BatchState.WAITING, BatchState.KEPT, stream.id, upto),
        ).rowcount
        self._file.add("samples_lost", lost)
        log.warning(
            "the trainer's journal was set back to an earlier state: %d batches that it had receipted are "
            "sent to it again%s",
            *(returned, f"; {lost} samples are LOST, for they are no longer here" if lost else ""),
        )
        return returned

    def _gather(self) -> int:
        """Move what waits in earlier streams into the current one, batch by batch; return how many."""
        count = 0
        while True:
            with self._file.lock:
                with self._file.reading() as db:
                    found = db.execute(
                        "SELECT number, samples, payload FROM batches WHERE state = ? AND stream < ? "
                        "ORDER BY stream, sequence LIMIT 1",
                        (BatchState.WAITING, self.current.id),
                    ).fetchone()
                if found is None:
                    return count
                number, samples, payload = found
                batch = read_sent(payload)
                with self._file.transaction() as db:
                    self.append(db, partial(moved, batch), samples)
                    _empty(db, number, BatchState.GIVEN_UP)
                count += 1


def read_sent(payload: bytes) -> ActivationBatch | AdapterMessage:
    """What an outbox holds."""
    return unpack_adapter(payload) if is_adapter_message(payload) else unpack(ActivationBatch, payload)


def moved(batch: ActivationBatch | AdapterMessage, slot: Slot) -> bytes:
    """The message of a batch that gets another place."""
    if not isinstance(batch, ActivationBatch):
        place = {"stream": slot.stream, "sequence": slot.sequence, "floor": slot.floor}
        return pack(msgspec.structs.replace(batch, **place, previous=slot.previous))
    numbers = np.arange(slot.first_sample, slot.first_sample + len(batch.sample_ids))
    return pack(
        msgspec.structs.replace(
            batch,
            stream=slot.stream,
            sequence=slot.sequence,
            floor=slot.floor,
            samples=to_bin(numbers, "<u4"),
            previous=slot.previous,
        )
    )


def _empty(db: sqlite3.Connection, number: int, state: BatchState) -> None:
    """Let go of a batch's payload."""
    db.execute("UPDATE batches SET state = ?, bytes = 0, payload = x'' WHERE number = ?", (state, number))
