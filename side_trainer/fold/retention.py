"""Years of data: batches are let go once they are learnt from, and a snapshot stands for them.

A ``snapshot`` record says which batches stay; from there on no other row is drawn. When the fold has come to
it, its state is written into the journal, and what it stands for is deleted. A fold of that journal begins at
the snapshot, and goes on to the same bits as one that has seen everything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from side_trainer.fold.checkpoint import Checkpoint, newest_files, read_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import RecordKind, SnapshotRecord
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import DecodeError, StateError

_log = logging.getLogger(__name__)
_LOOK_EVERY_S: Final = 60.0
_DAY_S: Final = 86_400.0
_SLACK: Final = 0.8
"""To which share of a bound the journal is cut: a snapshot is made now and then, and not for every batch."""


class Retention:
    """Decides what is let go.

    Args:
        config: The bounds.
        journal: What is bounded.
        fold: Where it is.
        clock: Unix time, in seconds.
    """

    def __init__(
        self, config: TrainerConfig, journal: Journal, fold: Fold, clock: Callable[[], float] = time.time
    ) -> None:
        self._config = config
        self._journal = journal
        self._fold = fold
        self._clock = clock
        self._looked_s: float | None = None
        self._stood_for = 0  # the last snapshot record that the journal's snapshot is known to include

    def due(self) -> SnapshotRecord | None:
        """What to journal now, all that came being learnt from; None most of the time."""
        config, now = self._config, self._clock()
        if not (config.keep_days or config.keep_gib or config.keep_samples) or not self._fold.begun:
            return None
        if self._looked_s is not None and 0 <= now - self._looked_s < _LOOK_EVERY_S:
            return None
        self._looked_s = now
        self._journal.keeping.note_hour(now, self._journal.tail)
        method = self._fold.method
        batches = self._journal.batches(self._fold.offset, since=method.kept_since)
        before = max(self._too_old(now), self._too_many(batches), self._too_large(batches))
        if not method.lets_go or before <= method.kept_since or not batches or batches[0][0] >= before:
            return None
        return SnapshotRecord(before=min(before, batches[-1][0]))  # the last one stays

    def _too_old(self, now: float) -> int:
        days = self._config.keep_days
        keeping = self._journal.keeping
        if not days or not keeping.before(now - days * _DAY_S / _SLACK):
            return 0
        return keeping.before(now - days * _DAY_S) + 1

    def _too_many(self, batches: list[tuple[int, int]]) -> int:
        most = self._config.keep_samples
        if not most or sum(rows for _, rows in batches) <= most:
            return 0
        left = int(_SLACK * most)
        for offset, rows in reversed(batches):
            left -= rows
            if left < 0:
                return offset + 1
        return 0

    def _too_large(self, batches: list[tuple[int, int]]) -> int:
        most, taken = self._config.keep_gib * 2**30, self._journal.keeping.nbytes
        if not most or taken <= most:
            return 0
        gone = int(len(batches) * (1 - _SLACK * most / taken))
        return batches[min(gone, len(batches) - 1)][0]

    def let_go(self, directory: Path) -> bool:
        """Delete some of what the newest checkpoint stands for; return whether there is more to delete.

        Args:
            directory: Where checkpoints are.
        """
        records = self._journal.others(self._fold.offset, (RecordKind.SNAPSHOT.value,))
        if not records:
            return False
        before = msgspec.json.decode(records[-1].payload, type=SnapshotRecord).before
        if not self._journal.keeping.has_before(before):
            return False
        if self._stood_for < records[-1].offset:
            if _offset(self._journal.keeping.snapshot) < records[-1].offset:
                newest = next((path.read_bytes() for path in newest_files(directory)), None)
                if newest is None or _offset(newest) < records[-1].offset:
                    return False
                self._journal.keeping.keep(newest)
            self._stood_for = records[-1].offset
        if more := self._journal.keeping.let_go(before):
            return more
        _log.info("batches before record %d are let go; what was learnt of them stays", before)
        return False


def _offset(snapshot: bytes | None) -> int:
    return 0 if snapshot is None else read_checkpoint(snapshot).about.offset


def snapshot_of(journal: Journal) -> Checkpoint | None:
    """What stands for the batches of a journal that are no longer there; None if all are.

    Raises:
        StateError: it is damaged.
    """
    data = journal.keeping.snapshot
    if data is None:
        return None
    try:
        return read_checkpoint(data)
    except DecodeError as exc:
        raise StateError(f"the snapshot in {journal.path} is damaged: {exc}") from exc


def begin(fold: Fold, journal: Journal) -> int:
    """Bring a fresh fold to where the journal's records begin; return how many records that skips."""
    snapshot = snapshot_of(journal)
    if snapshot is None:
        return 0
    fold.restore(snapshot.about.offset, snapshot.about.updates, snapshot.arrays)
    return snapshot.about.offset
