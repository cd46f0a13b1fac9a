"""Which row is which, now and after a restart: equal rows are counted, on disk once there are many."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Final

from edge_agent.samples.sample import BrokenRow, Row, Sample
from sidestream.backbone.inputs import content_of
from sidestream.contract.errors import StateError
from sidestream.host.state_dir import touch_private

SCRATCH_NAME: Final = "seen.db"
_RECENT: Final = 512
"""Contents whose counts are in memory; one transaction then puts them away."""


class Identities:
    """Turns rows into samples by counting how often each content has occurred.

    The n-th occurrence of a content always gets the same key, whatever stands between and whichever file of a
    set it is in: reading everything again after a restart names every sample as before. So the counts of one
    reading are of no use to the next. They are kept in a file that loses its name as soon as it is open:
    however the process ends, nothing is left of it. Memory does not grow with the rows.

    Args:
        folder: Where that file is; None for the system's place for such files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._recent: dict[bytes, int] = {}
        self._room = _RECENT
        self._older: sqlite3.Connection | None = None

    def name(self, row: Row | BrokenRow) -> Sample:
        """Give the row its key.

        Raises:
            StateError: counts on disk cannot be read.
        """
        if isinstance(row, BrokenRow):
            return Sample("", None, self._key(_hash(b"broken" + row.content)), broken=True)
        label = b"\1" + row.label.encode() if row.label is not None else b"\0"
        pair = b"\2" if row.pair is not None else b""  # else it could be a text that holds both
        content = _hash(content_of(row.input) + b"\0" + label + pair)
        return Sample(row.input, row.label, self._key(content))

    def _key(self, content: bytes) -> bytes:
        times = self._times(content) + 1
        self._recent[content] = times
        if len(self._recent) >= self._room:
            self._put_away()
        return _hash(content + times.to_bytes(8, "little"))

    def forget(self) -> None:
        """Start counting anew, before the whole source is read again."""
        self.close()
        self._recent.clear()

    def close(self) -> None:
        """Give the disk space back. Idempotent."""
        if self._older is not None:
            self._older.close()
            self._older = None

    def _times(self, content: bytes) -> int:
        times = self._recent.get(content)
        if times is not None or self._older is None:
            return times or 0
        try:
            found = self._older.execute("SELECT times FROM seen WHERE content = ?", (content,)).fetchone()
        except sqlite3.Error as exc:
            raise StateError(
                f"{self._folder or 'temporary files'}: what was read cannot be recorded: {exc}"
            ) from exc
        return int(found[0]) if found else 0

    def _put_away(self) -> None:
        """Move the counts in memory to disk; where that is full they stay, and the outbox will say so."""
        try:
            self._older = self._older or _open(self._folder)
            with self._older:
                self._older.execute("BEGIN")
                self._older.executemany(
                    "INSERT OR REPLACE INTO seen VALUES (?, ?)", sorted(self._recent.items())
                )
        except (sqlite3.OperationalError, OSError):
            self._room = len(self._recent) + _RECENT
        else:
            self._recent.clear()
            self._room = _RECENT


def _open(folder: Path | None) -> sqlite3.Connection:
    """A database that is gone once it is closed; nothing in it is ever synced."""
    path = folder / SCRATCH_NAME if folder is not None else None
    if path is not None:
        path.unlink(missing_ok=True)
        touch_private(path)
    db = sqlite3.connect(path or "", isolation_level=None, check_same_thread=False)
    try:
        for setting in (
            "locking_mode = EXCLUSIVE",
            "journal_mode = MEMORY",
            "synchronous = OFF",
            "cache_size = -1024",
        ):
            db.execute(f"PRAGMA {setting}")
        db.execute("CREATE TABLE seen (content BLOB PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID")
        if path is not None:
            path.unlink()
    except BaseException:
        db.close()
        raise
    return db


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
