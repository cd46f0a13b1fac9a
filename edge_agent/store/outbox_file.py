"""The SQLite file behind the outbox: how it is opened, transactions, named values and counters in it.

``synchronous`` is FULL: with NORMAL a power cut may roll the last commits back, and a sequence number would
be given out a second time; the trainer, which has journaled the first one, would take the new batch for a
duplicate, and its samples would be lost.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from edge_agent.store.unlabelled import SCHEMA as UNLABELLED_SCHEMA
from sidestream.contract.errors import StateError, StorageError
from sidestream.contract.messages import COUNTERS
from sidestream.host.state_dir import touch_private

FILE_NAME: Final = "agent.db"
_REMEDY: Final = (
    "; put a copy of the state directory, however old, in its place. From an empty one every sample is sent "
    "again, and counts once more"
)
_SCHEMA_VERSION: Final = 3
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS consumed (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS held_out (
    key BLOB PRIMARY KEY, input TEXT NOT NULL, label TEXT
);
CREATE TABLE IF NOT EXISTS streams (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, next_sequence INTEGER NOT NULL DEFAULT 1,
    next_sample INTEGER NOT NULL DEFAULT 0, head TEXT NOT NULL DEFAULT '', gone INTEGER NOT NULL DEFAULT 0,
    receipted INTEGER NOT NULL DEFAULT 0, fence INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY, stream INTEGER NOT NULL, sequence INTEGER NOT NULL,
    floor INTEGER NOT NULL, samples INTEGER NOT NULL, digest TEXT NOT NULL, state INTEGER NOT NULL,
    bytes INTEGER NOT NULL, payload BLOB NOT NULL, UNIQUE (stream, sequence)
);
CREATE TABLE IF NOT EXISTS split_batches (
    id INTEGER PRIMARY KEY, samples INTEGER NOT NULL, body BLOB NOT NULL, passes INTEGER NOT NULL DEFAULT 0,
    shuffle INTEGER NOT NULL, base BLOB NOT NULL DEFAULT x'', sketch BLOB NOT NULL DEFAULT x''
);
CREATE INDEX IF NOT EXISTS split_turns ON split_batches (passes, shuffle);
CREATE TABLE IF NOT EXISTS held_states (
    batch INTEGER NOT NULL, part INTEGER NOT NULL, tensor BLOB NOT NULL, PRIMARY KEY (batch, part)
);
CREATE TABLE IF NOT EXISTS flights (
    ticket BLOB PRIMARY KEY, batch INTEGER NOT NULL, slot INTEGER NOT NULL, adapter INTEGER NOT NULL,
    stream TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS batch_states ON batches (state, stream, sequence, bytes);
"""


class OutboxFile:
    """The file in a state directory. Safe between threads.

    Args:
        folder: The state directory.

    Raises:
        StateError: it cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self.lock = threading.RLock()
        """Whoever holds it is alone; a transaction takes it too."""
        self._volatile: Counter[str] = Counter()
        self._saving: Counter[str] = Counter()  # what of it the running transaction saves
        self._db = _open(self.path)

    def exchange(self, keep_as: Path | None, other: Path) -> None:
        """Keep the file as another one, or drop it, and go on with ``other``, or else with a new one.

        Raises:
            StateError: the files cannot be renamed.
        """
        self._db.close()
        try:
            self.path.rename(keep_as) if keep_as is not None else self.path.unlink()
            if other.exists():
                other.rename(self.path)
        except OSError as exc:
            raise StateError(f"{self.path.parent}: {exc.strerror or exc}") from exc
        self._db = _open(self.path)

    def close(self) -> None:
        """Close it; counts that were not saved stay in memory."""
        self._db.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """To look at it.

        Raises:
            StorageError: the disk did not do its part.
            StateError: the file is damaged.
        """
        with self.lock, as_state_error(self.path):
            yield self._db

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """To change it: all of what is done within is on the disk afterwards, or nothing.

        Raises:
            StorageError: the disk did not do its part.
            StateError: the file is damaged.
        """
        with self.lock, as_state_error(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
                self._volatile -= self._saving
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            finally:
                self._saving = Counter()

    # --- named values ------------------------------------------------------------------------------------

    def value(self, name: str) -> str:
        """A named value; empty if it was never set."""
        with self.reading() as db:
            row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return "" if row is None else str(row[0])

    def set_value(self, name: str, value: str) -> None:
        """Set it, within a transaction."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # --- counters ----------------------------------------------------------------------------------------

    def count(self, name: str, amount: int) -> None:
        """Add to a counter that may lose a little in a crash: it is saved by :meth:`save_counts`."""
        assert name in COUNTERS
        with self.lock:
            self._volatile[name] += amount

    def add(self, name: str, amount: float) -> None:
        """Add to a counter, within a transaction."""
        assert name in COUNTERS
        if amount:
            self._db.execute(
                "INSERT INTO counters VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                (name, amount),
            )

    def save_counts(self) -> None:
        """Make what was counted durable, within a transaction."""
        for name, amount in self._volatile.items():
            self.add(name, amount)
        self._saving = Counter(self._volatile)

    def restart_counters(self) -> None:
        """Let all of them begin at 0 again, within a transaction."""
        self._db.execute("DELETE FROM counters")
        self._saving = Counter(self._volatile)

    def counters(self) -> Counter[str]:
        """All of them, saved or not, by field of Telemetry."""
        with self.reading() as db:
            saved = Counter(dict(db.execute("SELECT name, value FROM counters").fetchall()))
        return saved + self._volatile


def _open(path: Path) -> sqlite3.Connection:
    with as_state_error(path):
        touch_private(path)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
        try:
            _prepare(db, path)
        except BaseException:
            db.close()
            raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _SCHEMA_VERSION):
        raise StateError(
            f"{path}: written by another version of Sidestream (schema {version}); finish with that version, "
            f"or "
            "give a new --state-dir"
        )
    db.executescript(_SCHEMA + UNLABELLED_SCHEMA)
    db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")


@contextmanager
def as_state_error(path: Path) -> Iterator[None]:
    """Say what goes wrong with the file as a user can mend it.

    Raises:
        StorageError: the disk did not do its part.
        StateError: the file is damaged.
    """
    try:
        yield
    except (sqlite3.OperationalError, OSError) as exc:
        busy = "locked" in str(exc)
        remedy = "another process is at it: try again" if busy else "free disk space, or mend the disk"
        raise StorageError(f"{path}: {exc}; {remedy}") from exc
    except sqlite3.Error as exc:
        raise StateError(f"{path} is damaged: {exc}{_REMEDY}") from exc
