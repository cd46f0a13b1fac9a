"""The journal: every fact that changes the weights, in order, durable before anyone is told.

One SQLite file. A record has an offset; a batch has also its identity ``(stream, sequence)``, which is
unique, and so it counts once however often it arrives. The journal knows nothing of networks or tensors;
payloads are bytes to it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import sys
import threading
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from contract.errors import MismatchError, NoRoomError, StateError, StorageError

FILE_NAME: Final = "journal.db"
_FORMAT: Final = 1
_COLUMNS: Final = "offset, kind, tier, samples, payload, stream, digest"
_REMEDY: Final = "; restore the state directory from a backup"
_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE records (
    offset INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    tier TEXT,
    stream TEXT,
    sequence INTEGER,
    samples INTEGER NOT NULL DEFAULT 0,
    payload BLOB NOT NULL,
    digest BLOB
);
CREATE UNIQUE INDEX batch_identity ON records (stream, sequence) WHERE stream IS NOT NULL;
CREATE TABLE streams (
    stream TEXT PRIMARY KEY,
    device TEXT NOT NULL,
    watermark INTEGER NOT NULL DEFAULT 0,
    batches INTEGER NOT NULL DEFAULT 0,
    samples INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
"""

_QUARANTINE_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS held (
    number INTEGER PRIMARY KEY,
    stream TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    tier TEXT NOT NULL,
    samples INTEGER NOT NULL,
    payload BLOB NOT NULL,
    digest BLOB,
    UNIQUE (stream, sequence)
);
CREATE TABLE IF NOT EXISTS verdicts (
    device TEXT PRIMARY KEY, state TEXT NOT NULL, reason TEXT NOT NULL, since REAL NOT NULL
) WITHOUT ROWID
"""
"""Batches that are kept and are no records, and why; :mod:`side_trainer.quarantine` fills them."""


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


class Held(NamedTuple):
    """What is held of a device."""

    batches: int
    """Kept and not folded."""
    samples: int
    """In them."""
    bytes: int
    """Of their payloads."""


class Journal:
    """A journal file, open for reading and appending. Safe to use from several threads.

    Args:
        path: The file; made if it is missing, unless ``read_only``.
        read_only: Look only, beside a trainer that may be running.

    Raises:
        StateError: if the file cannot be opened or is no journal.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._offset = 0
        self._held_bytes: int | None = None  # counted when it is asked for
        if read_only and not path.exists():
            raise StateError(f"no journal at {path}; give the trainer's state directory with --state-dir")
        target = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        try:
            self._db = sqlite3.connect(target, uri=True, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as exc:
            raise StateError(f"journal {path} cannot be opened: {exc}") from exc
        try:
            self._open(read_only)
        except BaseException as exc:
            self._db.close()
            if isinstance(exc, sqlite3.Error):
                raise StateError(f"journal {path} cannot be used: {exc}{_REMEDY}, if it is damaged") from exc
            raise

    def _open(self, read_only: bool) -> None:
        self._db.execute("PRAGMA busy_timeout = 10000")
        if not read_only:
            self._db.execute("PRAGMA journal_mode = WAL")
            # A receipt promises that the batch outlives a power cut, so every commit reaches the disk.
            self._db.execute("PRAGMA synchronous = FULL")
            self._create()
            for statement in _QUARANTINE_SCHEMA.split(";"):
                self._db.execute(statement)
            for table in ("records", "held"):
                if not self._has_digests(table):
                    self._db.execute(f"ALTER TABLE {table} ADD COLUMN digest BLOB")
            self._check()
        self._columns = _COLUMNS if self._has_digests() else _COLUMNS.replace("digest", "NULL")
        self.run: str = self._meta("run")
        if self._meta("format") != str(_FORMAT):
            raise StateError(f"{self._path} was written by another version of Sidestream")
        self._offset = self._one("SELECT coalesce(max(offset), 0) FROM records")

    @property
    def folder(self) -> Path:
        """Where it lies: the state directory."""
        return self._path.parent

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # --- appending -----------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Group appends: all of them are durable when the block ends, none if it raises.

        Raises:
            StorageError: if the file cannot be written, on a full disk for one.
        """
        with self._lock:
            offset = self._offset
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException as exc:
                self._offset, self._held_bytes = offset, None
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(exc, sqlite3.Error):
                    raise StorageError(f"the journal cannot be written to: {exc}") from exc
                raise

    def append(self, kind: str, payload: bytes, *, tier: str | None = None) -> int:
        """Append a record that is no batch, durably; return its offset."""
        with self._lock:
            if self._db.in_transaction:
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
            if self.held_bytes + len(payload) > held_max_bytes:
                raise NoRoomError(f"the batches that are held take {self.held_bytes} bytes already")
            self._db.execute(
                "INSERT INTO held (stream, sequence, tier, samples, payload, digest) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (stream, sequence, tier, samples, payload, _digest(payload)),
            )
            self._held_bytes = self.held_bytes + len(payload)
        else:
            self._append_batch(payload, tier, stream, sequence, samples)
        self._advance(stream, floor)
        return True

    def _append_batch(self, payload: bytes, tier: str, stream: str, sequence: int, samples: int) -> None:
        self._insert("batch", payload, tier=tier, stream=stream, sequence=sequence, samples=samples)
        self._db.execute(
            "UPDATE streams SET batches = batches + 1, samples = samples + ?, bytes = bytes + ? "
            "WHERE stream = ?",
            (samples, len(payload), stream),
        )

    def release(self, device: str) -> list[tuple[str, int]]:
        """Make records of what is held of a device, in the order in which it came.

        Returns:
            Tier and samples of each batch.
        """
        with self.transaction():
            held = self._db.execute(
                "SELECT number, tier, held.samples FROM held JOIN streams USING (stream) "
                "WHERE device = ? ORDER BY number",
                (device,),
            ).fetchall()
            for number, _, _ in held:  # one at a time: there may be more of them than memory
                row = "SELECT payload, tier, stream, sequence, samples, digest FROM held WHERE number = ?"
                payload, *rest, digest = self._db.execute(row, (number,)).fetchone()
                self._check_held(number, payload, digest)
                self._append_batch(payload, *rest)
                self._db.execute("DELETE FROM held WHERE number = ?", (number,))
            self._held_bytes = None
        return [(tier, samples) for _, tier, samples in held]

    def _claim(self, stream: str, device: str, sequence: int, floor: int) -> bool:
        """Bind a new stream to its device; say whether the sequence is new."""
        assert self._db.in_transaction, "batches are appended within a transaction"
        self._db.execute("INSERT OR IGNORE INTO streams (stream, device) VALUES (?, ?)", (stream, device))
        owner, watermark = self._db.execute(
            "SELECT device, watermark FROM streams WHERE stream = ?", (stream,)
        ).fetchone()
        if owner != device:
            raise MismatchError(f"stream {stream[:8]} belongs to device {owner!r}, not to {device!r}")
        # At or below the watermark a batch is journaled, or the device gave it up and counted it as dropped.
        if sequence <= watermark:
            return False
        known = self._one(
            "SELECT EXISTS (SELECT 1 FROM records WHERE stream = ?1 AND sequence = ?2) "
            "OR EXISTS (SELECT 1 FROM held WHERE stream = ?1 AND sequence = ?2)",
            (stream, sequence),
        )
        if known:
            self._advance(stream, floor)
        return not known

    def _advance(self, stream: str, floor: int) -> None:
        """Raise the stream's watermark over the sequences that are settled without a gap."""
        watermark = max(floor - 1, self._one("SELECT watermark FROM streams WHERE stream = ?", (stream,)))
        for (sequence,) in self._db.execute(
            "SELECT sequence FROM records WHERE stream = ?1 AND sequence > ?2 "
            "UNION SELECT sequence FROM held WHERE stream = ?1 AND sequence > ?2 ORDER BY sequence",
            (stream, watermark),
        ):
            if sequence != watermark + 1:
                break
            watermark = sequence
        self._db.execute("UPDATE streams SET watermark = ? WHERE stream = ?", (watermark, stream))

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
        self._db.execute(
            "INSERT INTO records (offset, kind, tier, stream, sequence, samples, payload, digest) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (self._offset + 1, kind, tier, stream, sequence, samples, payload, _digest(payload)),
        )
        self._offset += 1
        return self._offset

    # --- reading -------------------------------------------------------------------------------------

    @property
    def tail(self) -> int:
        """The last committed record's offset; 0 in an empty journal."""
        with self._lock:
            return self._offset

    def read(self, after: int, *, limit: int = 64) -> list[Record]:
        """Up to ``limit`` committed records that follow the offset ``after``."""
        return self._records("WHERE offset > ? ORDER BY offset LIMIT ?", (after, limit))

    def get(self, offset: int) -> Record:
        """The record at an offset that exists."""
        record = next(iter(self.read(offset - 1, limit=1)), None)
        if record is None or record.offset != offset:
            raise StateError(f"journal {self._path} is damaged: record {offset} is missing{_REMEDY}")
        return record

    def batches(self, upto: int) -> list[tuple[int, str, int]]:
        """``(offset, tier, samples)`` of every batch up to an offset, in order, without payloads."""
        with self._reading() as db:
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
        with self._reading() as db:
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
        if digest is not None and digest != _digest(payload):
            raise StateError(f"journal {self._path} is damaged: record {offset} has changed{_REMEDY}")
        return Record(offset=offset, kind=kind, tier=tier, samples=samples, payload=payload, stream=stream)

    def stream(self, stream: str) -> StreamState | None:
        """One stream's state, or None if nothing of it came yet."""
        found = self._streams("WHERE stream = ?", (stream,))
        return found[0] if found else None

    def streams(self) -> list[StreamState]:
        """Every stream's state, by device."""
        return self._streams("ORDER BY device, stream", ())

    def _streams(self, clause: str, arguments: tuple[str, ...]) -> list[StreamState]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT stream, device, watermark, batches, samples, bytes FROM streams {clause}", arguments
            ).fetchall()
        fields = ("stream", "device", "watermark", "batches", "samples", "bytes")
        return [StreamState(**dict(zip(fields, row, strict=True))) for row in rows]

    def size_bytes(self) -> int:
        """On disk, the part that is not checkpointed into the file yet included."""
        files = (self._path, self._path.with_name(self._path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def samples(self) -> int:
        """Samples in all journaled batches."""
        with self._reading():
            return self._one("SELECT coalesce(sum(samples), 0) FROM streams")

    # --- quarantine ----------------------------------------------------------------------------------

    def set_verdict(
        self, device: str, state: str, reason: str, since: float, *, replace: bool = True
    ) -> bool:
        """Note what was decided about a device.

        Args:
            device: Its id.
            state: What was decided,
            reason: why,
            since: and when.
            replace: Also over what was decided before.

        Returns:
            Whether it was noted.
        """
        with self.transaction():
            cursor = self._db.execute(
                f"INSERT OR {'REPLACE' if replace else 'IGNORE'} INTO verdicts VALUES (?, ?, ?, ?)",
                (device, state, reason, since),
            )
            return cursor.rowcount > 0

    def verdicts(self) -> list[tuple[str, str, str, float]]:
        """``(device, state, reason, since)`` of every device about which something was decided."""
        with self._reading() as db:
            if not self._one("SELECT count(*) FROM sqlite_master WHERE name = 'verdicts'"):
                return []  # written by an older version, and looked at only
            return db.execute("SELECT * FROM verdicts ORDER BY device").fetchall()

    def held(self) -> dict[str, Held]:
        """What is held, by device."""
        with self._reading() as db:
            if not self._has_held():
                return {}
            rows = db.execute(
                "SELECT device, count(*), sum(held.samples), sum(length(payload)) FROM held "
                "JOIN streams USING (stream) GROUP BY device"
            ).fetchall()
        return {device: Held(*figures) for device, *figures in rows}

    @property
    def held_bytes(self) -> int:
        """Of the payloads that are held."""
        if self._held_bytes is None:
            with self._reading():
                self._held_bytes = self._one("SELECT coalesce(sum(length(payload)), 0) FROM held")
        return self._held_bytes

    def check_held(self) -> int:
        """Read every batch that is held; return how many there are.

        Raises:
            StateError: if one is not what was written.
        """
        with self._reading() as db:
            if not self._has_held():
                return 0
            digest = "digest" if self._has_digests("held") else "NULL"
            count = 0
            for row in db.execute(f"SELECT number, payload, {digest} FROM held ORDER BY number"):
                self._check_held(*row)
                count += 1
            return count

    def _check_held(self, number: int, payload: bytes, digest: bytes | None) -> None:
        if digest is not None and digest != _digest(payload):
            raise StateError(f"journal {self._path} is damaged: held batch {number} has changed{_REMEDY}")

    def _has_held(self) -> bool:
        """Whether it has been opened by a version that holds batches, or is only looked at."""
        return self._one("SELECT count(*) FROM sqlite_master WHERE name = 'held'") > 0

    @property
    def version_base(self) -> int:
        """What a weights version counts beside records: raised by a rebuild, so that versions only rise."""
        with self._reading():
            return int(self._meta("version_base", "0"))

    # --- small facts ---------------------------------------------------------------------------------

    def next_epoch(self) -> int:
        """Count a start of the trainer; return how many there have been."""
        with self._reading():
            epoch = int(self._meta("epoch")) + 1
            self._set_meta("epoch", str(epoch))
            return epoch

    @property
    def fence(self) -> int:
        """The highest fence that a trainer of this journal ever had."""
        with self._reading():
            return int(self._meta("fence", "0"))

    @fence.setter
    def fence(self, fence: int) -> None:
        self._set_meta("fence", str(fence))

    @property
    def published(self) -> dict[int, dict[str, int]]:
        """Weights versions that may be on the broker, with their chunks by tier; the highest is the last."""
        with self._reading():
            return {int(version): chunks for version, chunks in json.loads(self._meta("published")).items()}

    def set_published(self, versions: dict[int, dict[str, int]]) -> None:
        """Note versions before they are published, so that a restart can tidy up and never goes back."""
        with self._lock:
            self._set_meta("published", json.dumps(versions))

    @property
    def policies(self) -> dict[str, frozenset[str]]:
        """By tier, the token-sampling policies that its plans have had."""
        with self._reading():
            return {
                tier: frozenset(names) for tier, names in json.loads(self._meta("policies", "{}")).items()
            }

    @policies.setter
    def policies(self, policies: Mapping[str, AbstractSet[str]]) -> None:
        self._set_meta("policies", json.dumps({tier: sorted(names) for tier, names in policies.items()}))

    @property
    def plan_revision(self) -> int:
        """The highest plan revision ever published from this journal."""
        with self._reading():
            return int(self._meta("plan_revision"))

    @plan_revision.setter
    def plan_revision(self, revision: int) -> None:
        with self._lock:
            self._set_meta("plan_revision", str(revision))

    def _create(self) -> None:
        with self.transaction():
            if self._one("SELECT count(*) FROM sqlite_master WHERE name = 'meta'"):
                return
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            facts = {"run": secrets.token_hex(16), "format": _FORMAT, "epoch": 0, "published": "{}"}
            for key, value in {**facts, "plan_revision": 0}.items():
                self._db.execute("INSERT INTO meta VALUES (?, ?)", (key, str(value)))

    def _check(self) -> None:
        """Look at every page, as a trainer reads every record when it starts anyway."""
        found = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise StateError(f"journal {self._path} is damaged: {found.splitlines()[-1]}{_REMEDY}")

    def _meta(self, key: str, default: str = "") -> str:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else default

    def _set_meta(self, key: str, value: str) -> None:
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as exc:
                raise StateError(f"journal {self._path} cannot be read: {exc}{_REMEDY}") from exc

    def _has_digests(self, table: str = "records") -> bool:
        columns = self._db.execute(f"PRAGMA table_info({table})").fetchall()
        return any(column[1] == "digest" for column in columns)

    def _one(self, query: str, arguments: tuple[object, ...] = ()) -> int:
        return int(self._db.execute(query, arguments).fetchone()[0])


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=8).digest()
