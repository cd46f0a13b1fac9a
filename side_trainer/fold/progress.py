"""How far the weights are: records that wait, and passes over the journal that are owed while none comes."""

from __future__ import annotations

from typing import Final

from side_trainer.fold.fold import Fold
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import IdleRecord
from side_trainer.settings.schema import LearnerSettings

_SLICE_UPDATES: Final = 16


class Progress:
    """Ask from any thread.

    Args:
        journal: What there is to fold.
        fold: What is folded.
        settings: How many passes are made.
    """

    def __init__(self, journal: Journal, fold: Fold, settings: LearnerSettings) -> None:
        self._journal = journal
        self._fold = fold
        self._settings = settings

    @property
    def version(self) -> int:
        """Journal records folded in, and what a rebuild has added to that."""
        return self._journal.version_base + self._fold.offset

    @property
    def backlog(self) -> int:
        """Journal records not folded in yet."""
        return self._journal.tail - self._fold.offset

    @property
    def owed(self) -> int:
        """Rows that the passes still owe: new rows bring new ones. None owed, or fewer: they are done."""
        return int(self._settings.passes * len(self._fold.rows)) - self._fold.idle_rows

    @property
    def final(self) -> bool:
        """Whether nothing is left to learn."""
        return self.backlog == 0 and len(self._fold.rows) > 0 and self.owed <= 0

    def next_slice(self) -> IdleRecord:
        """Go on with the phase, or start one if rows have come since."""
        rows = _SLICE_UPDATES * self._settings.pass_rows
        last = self._fold.last_idle
        unfinished = last is not None and last.position + last.rows < last.total
        if last is not None and unfinished and self._same_rows(last.phase):
            position = last.position + last.rows
            rows = min(rows, last.total - position)
            return IdleRecord(phase=last.phase, position=position, rows=rows, total=last.total)
        total = self.owed
        return IdleRecord(phase=self._fold.offset, position=0, rows=min(rows, total), total=total)

    def _same_rows(self, phase: int) -> bool:
        return self._fold.rows.rows_before(phase + 1) == len(self._fold.rows)
