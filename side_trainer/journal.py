"""The journal: every fact that changes the weights, in order, durable before anyone is told.

One SQLite file. A record has an offset; a batch has also its identity ``(stream, sequence)``, which is
unique, and so it counts once however often it arrives. The journal knows nothing of networks or tensors;
payloads are bytes to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from contract.errors import MismatchError
from side_trainer.holding import Holding
from side_trainer.journal_facts import JournalFacts
from side_trainer.journal_file import digest_of

FILE_NAME: Final = "journal.db"
_COLUMNS: Final = "offset, kind, tier, samples, payload, stream, digest"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One entry."""

    offset: int
    """Its place, from 1, without gaps."""
    kind: str
    """``settings``, ``labels``, ``tier``, ``batch`` or ``idle``."""
    tier: str | None
    """Of a batch or a tier record."""
    samples: int
    """In a batch."""
    payload: bytes
    """A batch as it came over the wire; JSON otherwise."""
    stream: str | None = None
    """Of a batch."""


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """What the journal holds of one device's outbox."""

    stream: str
    """The outbox's id."""
    device: str
    """The device that it belongs to."""
    watermark: int
    """Every sequence up to here is journaled, or was given up by the device."""
    batches: int
    """Journaled."""
    samples: int
    """In them."""
    bytes: int
    """Of their payloads."""


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
        self.holding = Holding(self, self._append_batch)
        """What is held back."""

    def _open(self, read_only: bool) -> None:
        super()._open(read_only)
        self._columns = _COLUMNS if self.has_digests("records") else _COLUMNS.replace("digest", "NULL")
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

    def append_batch(
        self,
        payload: bytes,
        *,
        tier: str,
        device: str,
        stream: str,
        sequence: int,
        floor: int,
        samples: int,
        held: bool = False,
        held_max_bytes: int = sys.maxsize,
    ) -> bool:
        """Append a batch within a :meth:`transaction`; return False if it is there already.

        A ``held`` one is kept beside the records, and becomes one when its device is released.

        Raises:
            MismatchError: if the stream belongs to another device.
            NoRoomError: if it is to be held, and all that are would take more than ``held_max_bytes``.
        """
        if not self._claim(stream, device, sequence, floor):
            return False
        if held:
            self.holding.hold(
                payload,
                tier=tier,
                stream=stream,
                sequence=sequence,
                samples=samples,
                max_bytes=held_max_bytes,
            )
        else:
            self._append_batch(payload, tier, stream, sequence, samples)
        self._advance(stream, floor)
        return True

    def _append_batch(self, payload: bytes, tier: str, stream: str, sequence: int, samples: int) -> None:
        self._insert("batch", payload, tier=tier, stream=stream, sequence=sequence, samples=samples)
        self.db.execute(
            "UPDATE streams SET batches = batches + 1, samples = samples + ?, bytes = bytes + ? "
            "WHERE stream = ?",
            (samples, len(payload), stream),
        )

    def _claim(self, stream: str, device: str, sequence: int, floor: int) -> bool:
        """Bind a new stream to its device; say whether the sequence is new."""
        assert self.db.in_transaction, "batches are appended within a transaction"
        self.db.execute("INSERT OR IGNORE INTO streams (stream, device) VALUES (?, ?)", (stream, device))
        owner, watermark = self.db.execute(
            "SELECT device, watermark FROM streams WHERE stream = ?", (stream,)
        ).fetchone()
        if owner != device:
            raise MismatchError(f"stream {stream[:8]} belongs to device {owner!r}, not to {device!r}")
        # At or below the watermark a batch is journaled, or the device gave it up and counted it as dropped.
        if sequence <= watermark:
            return False
        known = self.one(
            "SELECT EXISTS (SELECT 1 FROM records WHERE stream = ?1 AND sequence = ?2) "
            "OR EXISTS (SELECT 1 FROM held WHERE stream = ?1 AND sequence = ?2)",
            (stream, sequence),
        )
        if known:
            self._advance(stream, floor)
        return not known

    def _advance(self, stream: str, floor: int) -> None:
        """Raise the stream's watermark over the sequences that are settled without a gap."""
        watermark = max(floor - 1, self.one("SELECT watermark FROM streams WHERE stream = ?", (stream,)))
        for (sequence,) in self.db.execute(
            "SELECT sequence FROM records WHERE stream = ?1 AND sequence > ?2 "
            "UNION SELECT sequence FROM held WHERE stream = ?1 AND sequence > ?2 ORDER BY sequence",
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

    def batches(self, upto: int) -> list[tuple[int, str, int]]:
        """``(offset, tier, samples)`` of every batch up to an offset, in order, without payloads."""
        with self.reading() as db:
            return db.execute(
                "SELECT offset, tier, samples FROM records WHERE kind = 'batch' AND offset <= ? "
                "ORDER BY offset",
                (upto,),
            ).fetchall()

    def others(self, upto: int, kinds: tuple[str, ...]) -> list[Record]:
        """The records of some kinds up to an offset, in order."""
        marks = ",".join("?" * len(kinds))
        return self._records(f"WHERE kind IN ({marks}) AND offset <= ? ORDER BY offset", (*kinds, upto))

    def _records(self, clause: str, arguments: tuple[object, ...]) -> list[Record]:
        with self.reading() as db:
            rows = db.execute(f"SELECT {self._columns} FROM records {clause}", arguments).fetchall()
        return [self._record(*row) for row in rows]

    def _record(
        self,
        offset: int,
        kind: str,
        tier: str | None,
        samples: int,
        payload: bytes,
        stream: str | None,
        digest: bytes | None,
    ) -> Record:
        """A record as it was written: a disk that changed a byte of it is noticed here."""
        if digest is not None and digest != digest_of(payload):
            raise self.damaged(f"record {offset} has changed")
        return Record(offset=offset, kind=kind, tier=tier, samples=samples, payload=payload, stream=stream)

    def stream(self, stream: str) -> StreamState | None:
        """One stream's state, or None if nothing of it came yet."""
        found = self._streams("WHERE stream = ?", (stream,))
        return found[0] if found else None

    def streams(self) -> list[StreamState]:
        """Every stream's state, by device."""
        return self._streams("ORDER BY device, stream", ())

    def _streams(self, clause: str, arguments: tuple[str, ...]) -> list[StreamState]:
        with self.reading() as db:
            rows = db.execute(
                f"SELECT stream, device, watermark, batches, samples, bytes FROM streams {clause}", arguments
            ).fetchall()
        fields = ("stream", "device", "watermark", "batches", "samples", "bytes")
        return [StreamState(**dict(zip(fields, row, strict=True))) for row in rows]

    def samples(self) -> int:
        """Samples in all journaled batches."""
        with self.reading():
            return self.one("SELECT coalesce(sum(samples), 0) FROM streams")
