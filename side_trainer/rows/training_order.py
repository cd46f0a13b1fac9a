"""Which rows are learnt from, and when: those that wait, then slices of shuffled passes. By counts alone.

Each row is learnt from once as it came, and in ``passes`` passes over all rows while none comes; few rows in
as many passes as make up ``least_updates`` updates. Batches that are let go are counted no more, but what was
owed still is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from side_trainer.journal.records import IdleRecord, LearnRecord
from side_trainer.rows.training_rows import Ints, RowStore
from side_trainer.settings.schema import LearnerSettings

_IDLE_STREAM: Final = 2
_SLICE_UPDATES: Final = 16
_NO_IDLE: Final = (0, 0, 0, 0)

Batches = list[tuple[int, int]]
"""Their records, and how many rows each has."""


class TrainingOrder:
    """What of a journal is learnt from next.

    Args:
        rows: All that are drawn from; numbered here.
    """

    def __init__(self, rows: RowStore) -> None:
        self.kept_since = 1
        """The first record of which batches are drawn from."""
        self.dropped = 0
        """Rows that were learnt from, and are drawn no more."""
        self.idle_rows = 0
        """Rows that idle records trained on."""
        self.last_idle: IdleRecord | None = None
        self.waiting: deque[tuple[int, int]] = deque()
        """Batches that no update has learnt from yet: their records, and how many rows each has."""
        self._rows = rows
        self._learns = 0  # since the last phase of idle training began
        self._shuffled: tuple[tuple[int, int], Ints] | None = None

    def arrived(self, offset: int, rows: int) -> None:
        """Number a batch's rows; they wait."""
        self._rows.add(offset, rows)
        self.waiting.append((offset, rows))

    # --- what waits ----------------------------------------------------------------------------------

    def next_learn(self, most: int) -> LearnRecord | None:
        """Learn from those that have waited longest, up to so many rows, and one batch at least."""
        if not self.waiting:
            return None
        through, rows = self.waiting[0][0], 0
        for offset, more in self.waiting:
            rows += more
            if rows > most:
                break
            through = offset
        return LearnRecord(through=through)

    def learn(self, record: LearnRecord) -> Batches:
        """The batches that are learnt from now.

        Raises:
            IndexError: they do not wait.
            AssertionError: the last of them is none.
        """
        chosen = self.chosen(record)
        self.learnt(len(chosen))
        return chosen

    def chosen(self, record: LearnRecord) -> Batches:
        """As :meth:`learn`, which waits still."""
        chosen = [self.waiting[0]]
        while chosen[-1][0] < record.through:
            chosen.append(self.waiting[len(chosen)])
        assert chosen[-1][0] == record.through
        return chosen

    def learnt(self, batches: int) -> None:
        """So many of those that wait have been learnt from."""
        for _ in range(batches):
            self.waiting.popleft()
        self._learns += 1

    # --- passes --------------------------------------------------------------------------------------

    def owed(self, passes: float, settings: LearnerSettings) -> int:
        """Rows that the passes still owe."""
        if not passes or not len(self._rows):
            return 0
        last, left, known = self.last_idle, 0, 0
        if last is not None:
            left, known = last.total - last.position - last.rows, self._rows.rows_before(last.phase + 1)
        fresh = (len(self._rows) - known) / len(self._rows)
        done = self._learns * (1 + settings.replay)
        lacking = max(0, int((settings.least_updates * fresh - done) * settings.pass_rows))
        return max(int(passes * len(self._rows)) - self.idle_rows, left + lacking)

    def next_idle(self, owed: int, pass_rows: int, offset: int) -> IdleRecord:
        """Go on with the phase, or start one at an offset if rows have come since."""
        rows = _SLICE_UPDATES * pass_rows
        last = self.last_idle
        unfinished = last is not None and last.position + last.rows < last.total
        if last is not None and unfinished and self._rows.rows_before(last.phase + 1) == len(self._rows):
            position = last.position + last.rows
            rows = min(rows, last.total - position)
            return IdleRecord(phase=last.phase, position=position, rows=rows, total=last.total)
        return IdleRecord(phase=offset, position=0, rows=min(rows, owed), total=owed)

    def idle(self, record: IdleRecord, seed: int) -> Ints:
        """The rows of a slice, in order; they are trained on now."""
        chosen = self.slice_of(record, seed)
        self.trained(record)
        return chosen

    def slice_of(self, record: IdleRecord, seed: int) -> Ints:
        """The rows of a slice, in order."""
        total = self._rows.rows_before(record.phase + 1)
        chosen = [
            self._pass(record.phase, position // total, total, seed)[position % total :][: record.rows]
            for position in _parts(record.position, record.rows, total)
        ]
        return np.concatenate(chosen)[: record.rows]

    def trained(self, record: IdleRecord) -> None:
        """A slice has been trained on."""
        self.idle_rows += record.rows
        self.last_idle = record
        if not record.position:
            self._learns = 0

    def _pass(self, phase: int, number: int, total: int, seed: int) -> Ints:
        """The order of a phase's pass ``number``; the last one is kept, slices come one after another."""
        if self._shuffled is None or self._shuffled[0] != (phase, number):
            generator = np.random.default_rng([seed, _IDLE_STREAM, phase, number])
            self._shuffled = (phase, number), generator.permutation(total)
        return self._shuffled[1]

    # --- what is let go ------------------------------------------------------------------------------

    def let_go(self, before: int, offset: int, settings: LearnerSettings) -> None:
        """Go on at an offset as if only the batches from a record on had ever come, but for what is owed."""
        assert not self.waiting or self.waiting[0][0] >= before, "what is let go is learnt from"
        owed = self.owed(settings.passes, settings)
        self.dropped += self._rows.drop_before(before)
        self.kept_since, self._learns, self._shuffled = before, 0, None
        self.last_idle = IdleRecord(phase=offset, position=0, rows=1, total=1)
        self.idle_rows = int(settings.passes * len(self._rows)) - owed

    # --- checkpoints ---------------------------------------------------------------------------------

    def counters(self) -> npt.NDArray[np.int64]:
        """All that the batches' offsets and rows do not say."""
        last = self.last_idle
        idle = _NO_IDLE if last is None else (last.phase, last.position, last.rows, last.total)
        waits = self.waiting[0][0] if self.waiting else 0
        return np.array([self.dropped, waits, self._learns, self.idle_rows, *idle], np.int64)

    def restore(
        self, counters: npt.NDArray[np.int64], kept_since: int, batches: Sequence[tuple[int, int]]
    ) -> None:
        """Return to what :meth:`counters` gave, with the batches that were there then."""
        self.dropped, waits, self._learns, self.idle_rows, phase, position, rows, total = counters.tolist()
        if total:
            self.last_idle = IdleRecord(phase=phase, position=position, rows=rows, total=total)
        self.kept_since = kept_since
        self._rows.reset(batches)
        self.waiting = deque(batches[bisect_left(batches, (waits, 0)) :] if waits else ())


def _parts(position: int, rows: int, total: int) -> Iterable[int]:
    """Where a slice starts, and where each further pass that it runs into does."""
    return [position, *range((position // total + 1) * total, position + rows, total)]
