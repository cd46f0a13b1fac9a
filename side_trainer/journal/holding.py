"""Batches that are kept and are no records, and what was decided about the devices that sent them.

Beside the records, in the same file: a held batch counts for its stream's watermark like any other, and
becomes a record when its device is released. :mod:`side_trainer.quarantine.quarantine` says what
the verdicts mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from side_trainer.journal.file import JournalFile, digest_of, is_whole
from sidestream.contract.errors import NoRoomError


class Held(NamedTuple):
    """What is held of a device."""

    batches: int
    """Kept and not folded."""
    samples: int
    """In them."""
    bytes: int
    """Of their payloads."""


class Holding:
    """What a journal holds back. Safe to use from several threads.

    Args:
        file: The journal's.
        append: Makes a record of a batch: payload, tier, stream, sequence, samples and kind.
    """

    def __init__(self, file: JournalFile, append: Callable[[bytes, str, str, int, int, str], None]) -> None:
        self._file = file
        self._append = append
        self._bytes: int | None = None  # counted when it is asked for
        file.rolled_back.append(self._forget)

    def _forget(self) -> None:
        self._bytes = None

    # --- batches -------------------------------------------------------------------------------------

    def hold(
        self,
        payload: bytes,
        tier: str,
        stream: str,
        sequence: int,
        samples: int,
        kind: str,
        *,
        max_bytes: int,
    ) -> None:
        """Keep a batch, within a transaction.

        Raises:
            NoRoomError: if all that are kept would take more than ``max_bytes``.
        """
        if self.size_bytes + len(payload) > max_bytes:
            raise NoRoomError(f"the batches that are held take {self.size_bytes} bytes already")
        self._file.db.execute(
            "INSERT INTO held (stream, sequence, tier, samples, kind, payload, digest) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (stream, sequence, tier, samples, kind, payload, digest_of(payload)),
        )
        self._bytes = self.size_bytes + len(payload)

    def release(self, device: str) -> list[tuple[str, int]]:
        """Make records of what is held of a device, in the order in which it came.

        Returns:
            Tier and samples of each batch.
        """
        with self._file.transaction():
            held = self._file.db.execute(
                "SELECT number, tier, held.samples FROM held JOIN streams USING (stream) "
                "WHERE device = ? ORDER BY number",
                (device,),
            ).fetchall()
            for number, _, _ in held:  # one at a time: there may be more of them than memory
                row = (
                    "SELECT payload, tier, stream, sequence, samples, kind, digest FROM held WHERE number = ?"
                )
                payload, *rest, digest = self._file.db.execute(row, (number,)).fetchone()
                self._check(number, payload, digest)
                self._append(payload, *rest)
                self._file.db.execute("DELETE FROM held WHERE number = ?", (number,))
            self._bytes = None
        return [(tier, samples) for _, tier, samples in held]

    def held(self) -> dict[str, Held]:
        """What is held, by device."""
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT device, count(*), sum(held.samples), sum(length(payload)) FROM held "
                "JOIN streams USING (stream) GROUP BY device"
            ).fetchall()
        return {device: Held(*figures) for device, *figures in rows}

    @property
    def size_bytes(self) -> int:
        """Of the payloads that are held."""
        if self._bytes is None:
            with self._file.reading():
                self._bytes = self._file.one("SELECT coalesce(sum(length(payload)), 0) FROM held")
        return self._bytes

    def check(self) -> int:
        """Read every batch that is held; return how many there are.

        Raises:
            StateError: if one is not what was written.
        """
        with self._file.reading() as db:
            count = 0
            for row in db.execute("SELECT number, payload, digest FROM held ORDER BY number"):
                self._check(*row)
                count += 1
            return count

    def _check(self, number: int, payload: bytes, digest: bytes) -> None:
        if not is_whole(payload, digest):
            raise self._file.damaged(f"held batch {number} has changed")

    # --- verdicts ------------------------------------------------------------------------------------

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
        with self._file.transaction():
            cursor = self._file.db.execute(
                f"INSERT OR {'REPLACE' if replace else 'IGNORE'} INTO verdicts VALUES (?, ?, ?, ?)",
                (device, state, reason, since),
            )
            return cursor.rowcount > 0

    def verdicts(self) -> list[tuple[str, str, str, float]]:
        """``(device, state, reason, since)`` of every device about which something was decided."""
        with self._file.reading() as db:
            return db.execute("SELECT * FROM verdicts ORDER BY device").fetchall()
