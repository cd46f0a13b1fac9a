"""The journal's SQLite file: opened, checked, read and written in transactions.

Knows the tables and that every commit has to reach the disk, and nothing of what the rows mean.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sidestream.contract.errors import StateError, StorageError
from sidestream.host.state_dir import touch_private

REMEDY: Final = "; restore the state directory from a backup"
_FORMAT: Final = 3
_CHECKED_BYTES: Final = 256 * 2**20
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
    digest BLOB NOT NULL
);
CREATE INDEX kinds ON records (kind, offset, stream, samples);
CREATE UNIQUE INDEX batch_identity ON records (stream, sequence) WHERE stream IS NOT NULL;
CREATE TABLE streams (
    stream TEXT PRIMARY KEY,
    device TEXT NOT NULL,
    watermark INTEGER NOT NULL DEFAULT 0,
    saved INTEGER NOT NULL DEFAULT 0,
    batches INTEGER NOT NULL DEFAULT 0,
    samples INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE identities (
    stream TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    content TEXT NOT NULL,
    previous TEXT NOT NULL,
    PRIMARY KEY (stream, sequence)
) WITHOUT ROWID;
CREATE TABLE samples (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE held (
    number INTEGER PRIMARY KEY,
    stream TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    tier TEXT NOT NULL,
    samples INTEGER NOT NULL,
    kind TEXT NOT NULL,
    payload BLOB NOT NULL,
    digest BLOB NOT NULL,
    UNIQUE (stream, sequence)
);
CREATE TABLE replies (
    tier TEXT NOT NULL,
    device TEXT NOT NULL,
    slot INTEGER NOT NULL,
    ticket BLOB NOT NULL,
    stream TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    payload BLOB NOT NULL,
    since REAL NOT NULL,
    PRIMARY KEY (tier, device, slot)
) WITHOUT ROWID;
CREATE TABLE verdicts (
    device TEXT PRIMARY KEY, state TEXT NOT NULL, reason TEXT NOT NULL, since REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE hours (since INTEGER PRIMARY KEY, offset INTEGER NOT NULL);
CREATE TABLE snapshot (one INTEGER PRIMARY KEY CHECK (one = 1), payload BLOB NOT NULL, digest BLOB NOT NULL);
"""
"""A batch that was taken has its row in ``identities`` for ever, and its samples' keys theirs in ``samples``;
its payload is a record, is held, or, if every sample of it had come before, is nowhere. ``replies`` is what
devices may still have to be told, which the records give too. ``kinds`` gives what a restart asks of records
without a look at what is in them. ``hours`` says which record came last before an hour of Unix time began,
and ``snapshot`` stands for batches that are no longer kept (:mod:`side_trainer.fold.retention`)."""


class JournalFile:
    """The file, open for reading and writing. Safe to use from several threads.

    Args:
        path: The file; made if it is missing, unless ``read_only``.
        read_only: Look only, beside a trainer that may be running.

    Raises:
        StateError: if the file cannot be opened or is no journal.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        """Where it is."""
        self.lock = threading.RLock()
        """Held by whoever works on the file."""
        self.rolled_back: list[Callable[[], None]] = []
        """Called after a transaction that came to nothing: what was remembered of it is to be forgotten."""
        if read_only and not path.exists():
            raise StateError(f"no journal at {path}; give the trainer's state directory with --state-dir")
        target = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        try:
            if not read_only:
                touch_private(path)
            self.db = sqlite3.connect(target, uri=True, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError) as exc:
            raise StateError(f"journal {path} cannot be opened: {exc}") from exc
        try:
            self._open(read_only)
        except BaseException as exc:
            self.db.close()
            if isinstance(exc, sqlite3.Error):
                raise StateError(f"journal {path} cannot be used: {exc}{REMEDY}, if it is damaged") from exc
            raise

    def _open(self, read_only: bool) -> None:
        self.db.execute("PRAGMA busy_timeout = 10000")
        if not read_only:
            self.db.execute("PRAGMA journal_mode = WAL")
            # A receipt promises that the batch outlives a power cut, so every commit reaches the disk.
            self.db.execute("PRAGMA synchronous = FULL")
            self._create()
            self._check()
        self.run: str = self.meta("run")
        """The journal's id."""
        if self.meta("format") != str(_FORMAT):
            raise StateError(
                f"{self.path} was written by another version of Sidestream; go on with that one, or begin "
                "anew with another --state-dir"
            )

    @property
    def folder(self) -> Path:
        """Where it lies: the state directory."""
        return self.path.parent

    def close(self) -> None:
        with self.lock:
            self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Group writes: all of them are durable when the block ends, none if it raises.

        Raises:
            StorageError: if the file cannot be written, on a full disk for one.
        """
        with self.lock:
            try:
                self.db.execute("BEGIN IMMEDIATE")
                yield
                self.db.execute("COMMIT")
            except BaseException as exc:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                for forget in self.rolled_back:
                    forget()
                if isinstance(exc, sqlite3.Error):
                    raise StorageError(f"the journal cannot be written to: {exc}") from exc
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, to ask.

        Raises:
            StateError: if the file cannot be read.
        """
        with self.lock:
            try:
                yield self.db
            except sqlite3.Error as exc:
                raise StateError(f"journal {self.path} cannot be read: {exc}{REMEDY}") from exc

    def one(self, query: str, arguments: tuple[object, ...] = ()) -> int:
        """The one number that a query gives."""
        return int(self.db.execute(query, arguments).fetchone()[0])

    def meta(self, key: str, default: str = "") -> str:
        """A fact by its name."""
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else default

    def set_meta(self, key: str, value: str) -> None:
        """Note a fact, durably."""
        with self.transaction():
            self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def damaged(self, what: str) -> StateError:
        """What to say of a row that is not what was written."""
        return StateError(f"journal {self.path} is damaged: {what}{REMEDY}")

    def size_bytes(self) -> int:
        """On disk, the part that is not checkpointed into the file yet included."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def _create(self) -> None:
        with self.transaction():
            if self.one("SELECT count(*) FROM sqlite_master WHERE name = 'meta'"):
                return
            for statement in _SCHEMA.split(";"):
                self.db.execute(statement)
            facts = (("run", secrets.token_hex(16)), ("format", str(_FORMAT)))
            self.db.executemany("INSERT INTO meta VALUES (?, ?)", facts)

    def _check(self) -> None:
        """Look at every page of a file that is read in no time; of others what is read, as it is read."""
        if self.path.stat().st_size > _CHECKED_BYTES:
            return
        found = self.db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise self.damaged(found.splitlines()[-1])


def digest_of(payload: bytes) -> bytes:
    """By which a row is known again."""
    return hashlib.blake2b(payload, digest_size=8).digest()


def is_whole(payload: object, digest: object) -> bool:
    """Whether a row is as it was written: one bit of the file makes bytes a text."""
    return isinstance(payload, bytes) and digest == digest_of(payload)
