"""When the fold's state is written down: now and then, when it is final, and at the end."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from metrics.catalogue import TrainerMetrics
from side_trainer.fold.checkpoint import resume, write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.fold.retention import begin
from side_trainer.journal.journal import Journal

_log = logging.getLogger(__name__)


class Checkpointer:
    """Brings a fresh fold to where the last checkpoint left it, then writes further ones.

    Args:
        directory: Where they are kept.
        fold: What is written.
        journal: What it is a fold of.
        metrics: Shown how long it takes.
    """

    def __init__(self, directory: Path, fold: Fold, journal: Journal, metrics: TrainerMetrics) -> None:
        self._directory = directory
        self._fold = fold
        self._run = journal.run
        self._metrics = metrics
        least = begin(fold, journal)
        if (found := resume(directory, fold, journal.run, journal.tail, least=least + 1)) is not None:
            _log.info("resumed at record %d of %d", found.about.offset, journal.tail)
        self._offset = fold.offset
        self._tried_at = time.monotonic()

    def write_if_due(self, every_s: float, *, final: bool) -> None:
        """Write one if the last is older than that, or there is nothing left to learn."""
        if time.monotonic() - self._tried_at >= every_s or final:
            self.write()

    def write(self) -> None:
        """Write one, unless the last one says the same."""
        self._tried_at = time.monotonic()
        if self._fold.offset == self._offset:
            return
        try:
            self._offset = write_checkpoint(self._directory, self._fold, self._run).offset
        except OSError as exc:
            _log.error("no checkpoint was written (%s); a restart will fold more of the journal again", exc)
            return
        self._metrics.checkpoint_seconds.observe(time.monotonic() - self._tried_at)
        self._metrics.checkpoint_timestamp.set_to_current_time()
