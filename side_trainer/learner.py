"""The learner thread: folds the journal, idles usefully, checkpoints and publishes.

It is the only thread that touches the fold, and the only one that trains.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from metrics.catalogue import Kind, Reason, Source, TrainerMetrics
from side_trainer.broadcast.releases import Releases
from side_trainer.broadcast.replies import Replies
from side_trainer.cells.group import CellLost
from side_trainer.cells.steps import step_of
from side_trainer.fold.checkpointer import Checkpointer
from side_trainer.fold.fold import Fold
from side_trainer.fold.progress import Progress
from side_trainer.fold.retention import Retention
from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import RecordKind
from side_trainer.method import Step
from side_trainer.queries.answering import Queries
from side_trainer.settings.schema import TrainerConfig
from side_trainer.together import Together
from sidestream.contract.errors import StateError
from sidestream.host.trace import Trace

_log = logging.getLogger(__name__)
_PROGRESS_EVERY_S: Final = 5.0
_AT_ONCE: Final = 4
_STORAGE_RETRY_S: Final = 5.0
_ARRIVED: Final = frozenset(
    kind.value for kind in (RecordKind.BATCH, RecordKind.REUSE, RecordKind.UPDATE, RecordKind.UPLOAD)
)
_UNMOVED: Final = frozenset({RecordKind.SNAPSHOT.value, RecordKind.ASSIGNMENT.value})
_SOURCES: Final = {
    "batch": Source.UPLOAD,
    "serve": Source.UPLOAD,
    "learn": Source.UPLOAD,
    "idle": Source.IDLE,
    "update": Source.DEVICE,
    "step": Source.UPLOAD,
}
"""What a record's first update is counted as; what follows on a batch's is replay."""


class Learner:
    """Keeps the weights up with the journal.

    Args:
        config: Cadences.
        journal: What to fold; idle records are appended to it.
        fold: What it comes to.
        progress: How far that is.
        checkpointer: Writes it down.
        retention: Lets go what it stands for.
        releases: Publishes it.
        replies: Tells devices what their batches gave.
        queries: What devices ask beside that.
        metrics: Counts updates.
        trace: Told what is done when.
        judge: Told of each batch's tier, stream, and loss before it was learnt.
        together: Keeps step with the other cells, where there are some.
    """

    def __init__(
        self,
        config: TrainerConfig,
        journal: Journal,
        fold: Fold,
        progress: Progress,
        checkpointer: Checkpointer,
        retention: Retention,
        releases: Releases,
        replies: Replies,
        queries: Queries,
        *,
        metrics: TrainerMetrics,
        trace: Trace,
        judge: Callable[[str, str, float], None] = lambda tier, stream, loss: None,
        together: Together | None = None,
    ) -> None:
        self._config = config
        self._journal = journal
        self._fold = fold
        self._progress = progress
        self._checkpointer = checkpointer
        self._retention = retention
        self._lets_go = True  # whether something may have to be deleted
        self._releases = releases
        self._replies = replies
        self._queries = queries
        self._metrics = metrics
        self._trace = trace
        self._judge = judge
        self._together = together
        self._wake = threading.Event()
        self._recovered = False  # whether all that was in the journal at the start is folded
        self._last_batch_at = self._told = time.monotonic()

    def wake(self, connected: bool) -> None:
        """There is something new: records or a plan, or a fresh connection; for any thread."""
        if connected:
            self._releases.again()
            self._replies.again()
        self._wake.set()

    def reconfigure(self, config: TrainerConfig) -> None:
        """Go on with other cadences; for any thread."""
        self._config = self._releases.config = config

    @property
    def behind(self) -> bool:
        """Whether so much waits to be learnt from that the devices should wait."""
        return self._progress.waiting > self._config.max_backlog

    def run(self, stop: threading.Event) -> None:
        """Learn until stopped, then checkpoint."""
        while not stop.is_set():
            busy = self._catch_up(stop)
            try:
                busy = self._learn(busy) or self._let_go()
                self._answer()
                busy = self._predict(learning=busy) or busy
                self._releases.publish_if_due()
            except StateError as exc:
                _log.error("%s; trying again in %.0f s", exc, _STORAGE_RETRY_S)
                stop.wait(_STORAGE_RETRY_S)
            if self._replies.all_written:
                self._checkpointer.write_if_due(self._config.checkpoint_every_s, final=self._progress.final)
            self._metrics.learner_backlog_records.set(self._progress.backlog)
            if self._together is not None:
                self._metrics.cells_apart.set(not self._together.there)
            if self._fold.begun:
                self._metrics.head_bytes.set(self._fold.method.head_bytes)
                self._metrics.unlearnt.set(self._fold.method.unlearnt)
            if not busy:
                self._wake.wait(0.1)
                self._wake.clear()
        if self._together is not None:
            self._together.leave()
        if self._replies.all_written:
            self._checkpointer.write()

    def _answer(self) -> None:
        """Write answers down and publish them; those that a restart makes again, only once it is through."""
        self._replies.write()
        self._recovered = self._recovered or not self._progress.backlog
        if self._recovered:
            self._replies.publish()

    def _predict(self, *, learning: bool) -> bool:
        """Answer a query, by weights that have all that was in the journal at the start."""
        if not self._recovered:
            return False
        method = self._fold.method if self._fold.begun else None
        return self._queries.answer(method, self._progress.version, learning=learning)

    def _catch_up(self, stop: threading.Event) -> bool:
        """Fold some of the records that follow; return whether there were any."""
        before = self._fold.offset
        for record in self._journal.read(before, limit=_AT_ONCE):
            if stop.is_set() or not self._may_fold(record):
                break
            try:
                self._apply(record)
            except CellLost as exc:
                _log.info("%s: this step is made again once all are there", exc)
                break
        return self._fold.offset > before

    def _may_fold(self, record: Record) -> bool:
        """A step of all cells waits until all are there."""
        if self._together is None or record.kind != RecordKind.STEP.value:
            return True
        there = self._together.meet()
        return there and record.offset == self._fold.offset + 1

    def _learn(self, busy: bool) -> bool:
        """Learn from what waits, or from what is there; return whether there is more to do."""
        if self._together is None:
            return self._own() or busy or self._idle()
        if self._progress.backlog or not self._together.meet():
            return busy
        try:
            return self._together.next_step(self._config.learner, quiet=self._quiet) or busy
        except CellLost as exc:
            _log.info("%s: nothing is learnt until all cells are there", exc)
            return busy

    def _own(self) -> bool:
        """Journal and apply what the method itself owes, once all there is has been folded."""
        if self._progress.backlog or not self._fold.begun:
            return False
        own = self._fold.method.next_own(time.monotonic())
        if own is None:
            return False
        kind, payload = own
        offset = self._journal.append(kind.value, payload)
        if offset == self._fold.offset + 1:
            self._apply(self._journal.get(offset))
        return True

    @property
    def _quiet(self) -> bool:
        return time.monotonic() - self._last_batch_at >= self._config.idle_after_s

    def _idle(self) -> bool:
        """Train a slice over the journal when nothing has arrived for a while; return whether it did."""
        if not self._quiet or self._progress.owed <= 0:
            return False
        offset = self._journal.append(RecordKind.IDLE.value, msgspec.json.encode(self._progress.next_idle()))
        # A batch may have been journaled in between: records are folded in the journal's order.
        if offset == self._fold.offset + 1:
            self._apply(self._journal.get(offset))
        if self._progress.owed <= 0:
            self._metrics.passes.inc(self._config.learner.passes)
        return True

    def _let_go(self) -> bool:
        """Journal what need not be kept, and delete it once a checkpoint stands for it."""
        if self._progress.waiting:
            return False
        if (snapshot := self._retention.due()) is not None:
            offset = self._journal.append(RecordKind.SNAPSHOT.value, msgspec.json.encode(snapshot))
            if offset == self._fold.offset + 1:
                self._apply(self._journal.get(offset))
            self._lets_go = True
            return True
        if not self._lets_go or not self._replies.all_written:
            return False
        self._checkpointer.write()
        self._lets_go = self._retention.let_go(self._journal.folder)
        return self._lets_go

    def _apply(self, record: Record) -> None:
        started, began = time.monotonic(), self._trace.now()
        step = self._fold.apply(record)
        self._replies.put(step.replies)
        if step.gradient_norm is not None:
            self._metrics.gradient_norm.set(step.gradient_norm)
        if step.staleness is not None:
            self._metrics.staleness.set(step.staleness)
        if step.updates:
            name = "idle updates" if record.kind == "idle" else "update"
            self._trace.add(name, "learner", began, record=record.offset, updates=step.updates)
            self._metrics.update_seconds.observe((time.monotonic() - started) / step.updates)
            for tier, loss in step.learnt.items():
                self._metrics.observe_loss(tier, loss, step.updates)
            self._tell()
        for device, weight in step.doubted.items():
            _log.warning(
                "what device %s sends counts %.0f %% in learning: its labels suit its samples worse than the "
                "other devices' do",
                *(device, 100 * weight),
            )
        for device, why in step.refused.items():
            self._metrics.messages_rejected.labels(Kind.ADAPTER, Reason.OTHER).inc()
            _log.warning("what device %s uploaded is left out of the average: %s", device, why)
        if record.kind in _UNMOVED:
            self._releases.unchanged()
        if record.kind in _ARRIVED:
            self._last_batch_at = time.monotonic()
            self._releases.heard(len(record.payload))
        self._count(record, step)
        for tier, stream, loss in step.served:
            self._judge(tier, stream, loss)

    def _count(self, record: Record, step: Step) -> None:
        source = _SOURCES.get(record.kind)
        if record.kind == RecordKind.STEP.value and not step_of(record).learns:
            source = Source.IDLE
        if source is None or not step.updates:
            return
        first = 1 if source is Source.UPLOAD else step.updates
        self._metrics.updates.labels(source).inc(first)
        if step.updates > first:
            self._metrics.updates.labels(Source.REPLAY).inc(step.updates - first)

    def _tell(self) -> None:
        """Log how far it is, now and then."""
        if time.monotonic() - self._told > _PROGRESS_EVERY_S:
            self._told = time.monotonic()
            _log.info(
                "version %d, %d behind; %d samples; loss %s",
                *(self._progress.version, self._progress.backlog, self._fold.samples),
                ", ".join(f"{tier} {loss:.3f}" for tier, loss in self._metrics.loss.items()),
            )
