"""How far the weights are: records that wait, and passes over the journal that are owed while none comes."""

from __future__ import annotations

from collections.abc import Callable

from side_trainer.fold.fold import Fold
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import IdleRecord
from side_trainer.settings.schema import LearnerSettings


class Progress:
    """Ask from any thread.

    Args:
        journal: What there is to fold.
        fold: What is folded.
        settings: How many passes are made.
        awaited: Whether devices are still to say something to what they were answered.
    """

    def __init__(
        self,
        journal: Journal,
        fold: Fold,
        settings: LearnerSettings,
        awaited: Callable[[], bool] = lambda: False,
    ) -> None:
        self._journal = journal
        self._fold = fold
        self._settings = settings
        self._awaited = awaited

    @property
    def version(self) -> int:
        """Journal records folded in, and what a rebuild or a set-back has added to that."""
        return self._journal.version_base + self._fold.offset

    @property
    def published(self) -> int:
        """The highest version that may be on the broker."""
        return self._journal.highest

    @property
    def backlog(self) -> int:
        """Journal records not folded in yet."""
        return self._journal.tail - self._fold.offset

    @property
    def waiting(self) -> int:
        """Records to fold, and batches that are folded and wait to be learnt from."""
        return self.backlog + (self._fold.method.unlearnt if self._fold.begun else 0)

    @property
    def owed(self) -> int:
        """Rows that the passes still owe; done with once none are."""
        return self._fold.method.owed(self._settings.passes) if self._fold.begun else 0

    @property
    def final(self) -> bool:
        """Whether nothing is left to learn."""
        if self.backlog or not (self._fold.samples or self._fold.updates) or self.owed > 0:
            return False
        return self._fold.method.unlearnt == 0 and not self._awaited()

    def next_idle(self) -> IdleRecord:
        """The slice of training to journal next."""
        return self._fold.method.next_idle(self._settings.passes, self._settings.pass_rows, self._fold.offset)
