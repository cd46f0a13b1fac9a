"""The journal: every fact that changes the weights, in order, durable before anyone is told.

One SQLite file. A record has an offset; a batch has also its identity ``(stream, sequence)``, which is
unique, and so it counts once however often it arrives. An identity is never believed without its content: of
two histories of one stream the journal takes one. A sample has a key, which is unique as well, and so it
counts once in whatever batch it arrives. The journal knows nothing of networks or tensors; payloads are bytes
to it.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from side_trainer.journal.decoded import DecodedBatches
from side_trainer.journal.facts import LOST, JournalFacts
from side_trainer.journal.file import digest_of, is_whole
from side_trainer.journal.holding import Holding
from side_trainer.journal.keeping import Keeping
from side_trainer.journal.records import StreamState
from side_trainer.journal.replies import ReplyTable

FILE_NAME: Final = "journal.db"
_COLUMNS: Final = "offset, kind, tier, samples, payload, stream, digest"


class Claim(enum.Enum):
    """What the journal says to a batch."""

    NEW = "new"
    """It is taken."""
    KNOWN = "known"
    """It was taken before."""
    FORKED = "forked"
    """It will never be taken: the stream is another device's, has another batch in its place or beside it, or
    was told to be without it."""


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A batch that may be journaled."""

    tier: str
    """Of the device,"""
    device: str
    """and its id."""
    stream: str
    """Of its outbox,"""
    sequence: int
    """the batch's place in it,"""
    floor: int
    """and the lowest that may still come."""
    content: str
    """By which the batch is known again,"""
    previous: str
    """and the same of the batch before it."""
    samples: int
    """How many are in it."""
    keys: Sequence[bytes]
    """Of each of them; none if the device gave none."""
    payload: bytes
    """As it came."""
    select: Callable[[Sequence[int]], bytes]
    """The payload with only some of its samples."""
    kind: str = "batch"
    """Of the record that it becomes."""
    counts: bool = True
    """Whether its samples are new ones, and not those of an earlier pass, or none."""
    repeat: bytes = b""
    """What is journaled where all of it had come before; empty for nothing."""


class Taken(NamedTuple):
    """What became of a batch."""

    claim: Claim
    samples: int = 0
    """That are new."""
    repeated: int = 0
    """That had come before, in another batch, and were left out."""
    offset: int = 0
    """Of its record; 0 where there is none, or not with all its samples."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One entry."""

    offset: int
    """Its place, from 1, without gaps."""
    kind: str
    """One of :class:`~side_trainer.journal.records.RecordKind`."""
    tier: str | None
    """Of a batch or a tier record."""
    samples: int
    """In a batch."""
    payload: bytes
    """What a device sent as it came over the wire, less the rows that had come before; JSON otherwise."""
    stream: str | None = None
    """Of what a device sent."""


class Journal(JournalFacts):
    """A journal file, open for reading and appending. Safe to use from several threads.

    Args:
        path: The file; made if it is missing, unless ``read_only``.
        read_only: Look only, beside a trainer that may be running.

    Raises:
        StateError: if the file cannot be opened or is no journal.
    """

    _offset = 0

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        super().__init__(path, read_only=read_only)
        self.decoded = DecodedBatches()
        """What is decoded of the newest batches."""
        self.holding = Holding(self, self._append_batch)
        """What is held back."""
        self.keeping = Keeping(self)
        """How long batches are kept."""
        self.replies = ReplyTable(self)
        """What devices may still have to be told."""

    def _open(self, read_only: bool) -> None:
        super()._open(read_only)
        self._offset = self.one("SELECT coalesce(max(offset), 0) FROM records")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Group appends: all of them are durable when the block ends, none if it raises.

        Raises:
            StorageError: if the file cannot be written, on a full disk for one.
        """
        with self.lock:
            offset = self._offset
            try:
                with super().transaction():
                    yield
            except BaseException:
                self._offset = offset
                raise

    # --- appending -----------------------------------------------------------------------------------

    def append(self, kind: str, payload: bytes, *, tier: str | None = None) -> int:
        """Append a record that is no batch, durably; return its offset."""
        with self.lock:
            if self.db.in_transaction:
                return self._insert(kind, payload, tier=tier)
            with self.transaction():
                return self._insert(kind, payload, tier=tier)

    def append_batch(self, batch: Arrived, *, held: bool = False, held_max_bytes: int = sys.maxsize) -> Taken:
        """Take a batch within a :meth:`transaction`, if it is new, without the samples that had come before.

        A ``held`` one is kept beside the records, and becomes one when its device is released.

        Raises:
            NoRoomError: if it is to be held, and all that are would take more than ``held_max_bytes``.
        """
        claim = self._claim(batch)
        if claim is not Claim.NEW:
            if claim is Claim.KNOWN:
                self._advance(batch.stream, batch.floor)
            return Taken(claim)
        seen = {row for row, key in enumerate(batch.keys) if self._has_sample(key)}
        fresh = [row for row in range(batch.samples) if row not in seen]
        if fresh:
            payload = batch.payload if len(fresh) == batch.samples else batch.select(fresh)
            keep = self._hold(held_max_bytes) if held else self._append_batch
            samples = len(fresh) if batch.counts else 0
            keep(payload, batch.tier, batch.stream, batch.sequence, samples, batch.kind)
        elif batch.repeat and not held:
            self._insert("repeat", batch.repeat, tier=batch.tier)
        self.db.execute(
            "INSERT INTO identities VALUES (?, ?, ?, ?)",
            (batch.stream, batch.sequence, batch.content, batch.previous),
        )
        self.db.executemany("INSERT OR IGNORE INTO samples VALUES (?)", [(key,) for key in batch.keys])
        self._advance(batch.stream, batch.floor)
        whole = not held and len(fresh) == batch.samples
        counted = (len(fresh), batch.samples - len(fresh)) if batch.counts else (0, 0)
        return Taken(claim, *counted, self._offset if whole else 0)

    def _has_sample(self, key: bytes) -> bool:
        return self.db.execute("SELECT 1 FROM samples WHERE key = ?", (key,)).fetchone() is not None

    def _hold(self, max_bytes: int) -> Callable[[bytes, str, str, int, int, str], None]:
        return partial(self.holding.hold, max_bytes=max_bytes)

    def _append_batch(
        self, payload: bytes, tier: str, stream: str, sequence: int, samples: int, kind: str
    ) -> None:
        self._insert(kind, payload, tier=tier, stream=stream, sequence=sequence, samples=samples)
        self.db.execute(
            "UPDATE streams SET batches = batches + 1, samples = samples + ?, bytes = bytes + ? "
            "WHERE stream = ?",
            (samples, len(payload), stream),
        )

    def _claim(self, batch: Arrived) -> Claim:
        """Bind a new stream to its device; say whether the batch is new, and of the history that is here."""
        assert self.db.in_transaction, "batches are appended within a transaction"
        self.db.execute(
            "INSERT OR IGNORE INTO streams (stream, device) VALUES (?, ?)", (batch.stream, batch.device)
        )
        owner, watermark = self.db.execute(
            "SELECT device, watermark FROM streams WHERE stream = ?", (batch.stream,)
        ).fetchone()
        if owner != batch.device:
            return Claim.FORKED
        beside = {
            sequence: (content, previous)
            for sequence, content, previous in self.db.execute(
                "SELECT sequence, content, previous FROM identities "
                "WHERE stream = ? AND sequence BETWEEN ? AND ?",
                (batch.stream, batch.sequence - 1, batch.sequence + 1),
            )
        }
        if (here := beside.get(batch.sequence)) is not None:
            return Claim.KNOWN if here[0] == batch.content else Claim.FORKED
        before, after = beside.get(batch.sequence - 1), beside.get(batch.sequence + 1)
        follows = before is None or batch.previous in (before[0], "")
        leads = after is None or after[1] in (batch.content, "")
        # Below the watermark the device had given up what is not here.
        return Claim.NEW if follows and leads and batch.sequence > watermark else Claim.FORKED

    def _advance(self, stream: str, floor: int) -> None:
        """Raise the stream's watermark over the sequences that are settled without a gap."""
        watermark = max(floor - 1, self.one("SELECT watermark FROM streams WHERE stream = ?", (stream,)))
        for (sequence,) in self.db.execute(
            "SELECT sequence FROM identities WHERE stream = ? AND sequence > ? ORDER BY sequence",
            (stream, watermark),
        ):
            if sequence != watermark + 1:
                break
            watermark = sequence
        self.db.execute("UPDATE streams SET watermark = ? WHERE stream = ?", (watermark, stream))

    def _insert(
        self,
        kind: str,
        payload: bytes,
        *,
        tier: str | None = None,
        stream: str | None = None,
        sequence: int | None = None,
        samples: int = 0,
    ) -> int:
        self.db.execute(
            "INSERT INTO records (offset, kind, tier, stream, sequence, samples, payload, digest) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (self._offset + 1, kind, tier, stream, sequence, samples, payload, digest_of(payload)),
        )
        self._offset += 1
        return self._offset

    # --- reading -------------------------------------------------------------------------------------

    @property
    def unbegun(self) -> bool:
        """Whether nothing in it is from a device: there is nothing to lose."""
        with self.reading():
            return not self.one(
                "SELECT (SELECT count(*) FROM records WHERE kind NOT IN ('settings', 'labels'))"
                " + (SELECT count(*) FROM identities)"
            )

    @property
    def tail(self) -> int:
        """The last committed record's offset; 0 in an empty journal."""
        with self.lock:
            return self._offset

    def read(self, after: int, *, limit: int = 64) -> list[Record]:
        """Up to ``limit`` committed records that follow the offset ``after``."""
        return self._records("WHERE offset > ? ORDER BY offset LIMIT ?", (after, limit))

    def get(self, offset: int) -> Record:
        """The record at an offset that exists."""
        record = next(iter(self.read(offset - 1, limit=1)), None)
        if record is None or record.offset != offset:
            raise self.damaged(f"record {offset} is missing")
        return record

    def batches(self, upto: int, *, since: int = 1) -> list[tuple[int, int]]:
        """``(offset, samples)`` of every batch from one offset up to another, in order."""
        with self.reading() as db:
            return db.execute(
                "SELECT offset, samples FROM records WHERE kind = 'batch' AND offset BETWEEN ? AND ? "
                "ORDER BY offset",
                (since, upto),
            ).fetchall()

    def samples_by_stream(self, upto: int, *, since: int = 1) -> list[tuple[str, int]]:
        """``(stream, samples)`` of such batches, in the order of each stream's first one."""
        with self.reading() as db:
            return db.execute(
                "SELECT stream, sum(samples) FROM records WHERE kind = 'batch' AND offset BETWEEN ? AND ? "
                "GROUP BY stream ORDER BY min(offset)",
                (since, upto),
            ).fetchall()

    def others(self, upto: int, kinds: tuple[str, ...]) -> list[Record]:
        """The records of some kinds up to an offset, in order: of kinds that there are few of."""
        marks = ",".join("?" * len(kinds))
        clause = f"INDEXED BY kinds WHERE kind IN ({marks}) AND offset <= ? ORDER BY offset"
        return self._records(clause, (*kinds, upto))

    def last(self, kind: str) -> Record | None:
        """The last record of a kind."""
        clause = "INDEXED BY kinds WHERE kind = ? ORDER BY offset DESC LIMIT 1"
        return next(iter(self._records(clause, (kind,))), None)

    def each(self, upto: int, kinds: tuple[str, ...]) -> Iterator[Record]:
        """As :meth:`others`, a few at a time: there may be more of them than memory."""
        after, marks = 0, ",".join("?" * len(kinds))
        clause = f"WHERE kind IN ({marks}) AND offset > ? AND offset <= ? ORDER BY offset LIMIT 64"
        while records := self._records(clause, (*kinds, after, upto)):
            yield from records
            after = records[-1].offset

    def _records(self, clause: str, arguments: tuple[object, ...]) -> list[Record]:
        with self.reading() as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM records {clause}", arguments).fetchall()
        return [self._record(*row) for row in rows]

    def _record(
        self,
        offset: int,
        kind: str,
        tier: str | None,
        samples: int,
        payload: bytes,
        stream: str | None,
        digest: bytes,
    ) -> Record:
        """A record as it was written: a disk that changed a byte of it is noticed here."""
        if not is_whole(payload, digest):
            raise self.damaged(f"record {offset} has changed")
        return Record(offset=offset, kind=kind, tier=tier, samples=samples, payload=payload, stream=stream)

    def stream(self, stream: str) -> StreamState | None:
        """One stream's state, or None if nothing of it came yet."""
        found = self._streams("WHERE stream = ?", (stream,))
        return found[0] if found else None

    def content(self, stream: str, sequence: int) -> str:
        """What the batch in a place is known by; empty if there is none."""
        query = "SELECT content FROM identities WHERE stream = ? AND sequence = ?"
        with self.reading() as db:
            row = db.execute(query, (stream, sequence)).fetchone()
        return str(row[0]) if row is not None else ""

    def streams(self) -> list[StreamState]:
        """Every stream's state, by device."""
        return self._streams("ORDER BY device, stream", ())

    def _streams(self, clause: str, arguments: tuple[str, ...]) -> list[StreamState]:
        fields = ("stream", "device", "watermark", "saved", "batches", "samples", "bytes")
        found = f"SELECT {', '.join(fields)}, value FROM streams LEFT JOIN meta ON key = ? || stream"
        with self.reading() as db:
            rows = db.execute(f"{found} {clause}", (LOST, *arguments)).fetchall()
        return [
            StreamState(**dict(zip(fields, row[:-1], strict=True)), lost=int(row[-1] or 0)) for row in rows
        ]

    def samples(self) -> int:
        """Samples in all journaled batches."""
        with self.reading():
            return self.one("SELECT coalesce(sum(samples), 0) FROM streams")
