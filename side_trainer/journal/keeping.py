"""How long batches are kept: what of the journal is old, and letting it go once a snapshot stands for it."""

from __future__ import annotations

from typing import Final

from side_trainer.journal.file import JournalFile, digest_of, is_whole

_GONE: Final = "('batch', 'learn', 'idle', 'snapshot')"
_AT_ONCE: Final = 500
_HOUR_S: Final = 3600


class Keeping:
    """Of one journal. What tells a repeated batch or sample from a new one stays, whatever is let go.

    Args:
        journal: What it is of.
    """

    def __init__(self, journal: JournalFile) -> None:
        self._journal = journal

    @property
    def nbytes(self) -> int:
        """What the journal takes on disk, without what is free for further records."""
        with self._journal.reading():
            pages, free, size = (
                self._journal.one(f"PRAGMA {name}") for name in ("page_count", "freelist_count", "page_size")
            )
        return (pages - free) * size

    def note_hour(self, now: float, tail: int) -> None:
        """Remember which record was the last one when an hour of Unix time began; it is ``tail`` now."""
        hour = int(now // _HOUR_S)
        with self._journal.reading():
            known = self._journal.one("SELECT coalesce(max(since), 0) FROM hours")
        if hour > known:
            with self._journal.transaction():
                self._journal.db.execute("INSERT INTO hours VALUES (?, ?)", (hour, tail))

    def before(self, then: float) -> int:
        """The last record that was here at some Unix time, as far as hours tell; 0 if none was."""
        query = "SELECT coalesce(max(offset), 0) FROM hours WHERE since <= ?"
        with self._journal.reading():
            return self._journal.one(query, (int(then // _HOUR_S),))

    @property
    def snapshot(self) -> bytes | None:
        """A checkpoint that stands for all that was let go; None if nothing was.

        Raises:
            StateError: it is damaged.
        """
        with self._journal.reading() as db:
            row = db.execute("SELECT payload, digest FROM snapshot").fetchone()
        if row is not None and not is_whole(*row):
            raise self._journal.damaged("its snapshot has changed")
        return None if row is None else row[0]

    def keep(self, snapshot: bytes) -> None:
        """Put one in the place of the one before it."""
        with self._journal.transaction():
            self._journal.db.execute(
                "INSERT OR REPLACE INTO snapshot VALUES (1, ?, ?)", (snapshot, digest_of(snapshot))
            )

    def has_before(self, offset: int) -> bool:
        """Whether a batch before an offset is still here."""
        query = "SELECT EXISTS (SELECT 1 FROM records WHERE kind = 'batch' AND offset < ?)"
        with self._journal.reading():
            return bool(self._journal.one(query, (offset,)))

    def let_go(self, before: int) -> bool:
        """Delete some of what was learnt from before a record; return whether there is more.

        A little at a time: whoever journals batches waits meanwhile.
        """
        chosen = f"SELECT offset FROM records WHERE kind IN {_GONE} AND offset < ? ORDER BY offset LIMIT ?"
        with self._journal.transaction():
            gone = self._journal.db.execute(
                f"DELETE FROM records WHERE offset IN ({chosen})", (before, _AT_ONCE)
            ).rowcount
            self._journal.db.execute("DELETE FROM hours WHERE offset < ?", (before,))
        return gone == _AT_ONCE
