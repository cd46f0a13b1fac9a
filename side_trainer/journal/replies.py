"""What devices may still have to be told of their batches: one message a slot, beside the records.

Derived: a fold of the records from the beginning makes the same messages. It is written down as they are
applied, before the checkpoint that includes them, so that a fold which goes on from there needs none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from side_trainer.journal.file import JournalFile


class StoredReply(NamedTuple):
    """A message to one device."""

    tier: str
    """The device's."""
    device: str
    """Its id."""
    slot: int
    """Where it looks."""
    ticket: bytes
    """Of the batch,"""
    stream: str
    """of the outbox that it came from,"""
    sequence: int
    """and its place there."""
    payload: bytes
    """Packed and not signed; empty where the slot is to be cleared."""
    since: float
    """Unix time at which it was made."""


class ReplyTable:
    """The table in a journal's file. Safe to use from several threads.

    Args:
        file: The journal's.
    """

    def __init__(self, file: JournalFile) -> None:
        self._file = file

    def put(self, replies: Iterable[StoredReply]) -> None:
        """Write messages, each over what is in its slot.

        Raises:
            StorageError: the file cannot be written to.
        """
        with self._file.transaction():
            self._file.db.executemany(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", list(replies)
            )

    def remove(self, replies: Iterable[StoredReply]) -> None:
        """Forget messages, if they are still what is in their slots."""
        keys = [(one.tier, one.device, one.slot, one.ticket) for one in replies]
        with self._file.transaction():
            self._file.db.executemany(
                "DELETE FROM replies WHERE tier = ? AND device = ? AND slot = ? AND ticket = ?", keys
            )

    def all(self) -> list[StoredReply]:
        """Every message, the oldest first."""
        with self._file.reading() as db:
            rows = db.execute("SELECT * FROM replies ORDER BY since, tier, device, slot").fetchall()
        return [StoredReply(*row) for row in rows]
