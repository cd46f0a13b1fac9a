"""The learner thread: folds the journal, idles usefully, checkpoints and publishes.

It is the only thread that touches the fold and torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from metrics.catalogue import Source, TrainerMetrics
from side_trainer.broadcast.publisher import Publisher, Version
from side_trainer.fold.checkpoint import resume, write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import RecordKind
from side_trainer.method import Step
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import StateError
from sidestream.contract.tensors import Floats
from sidestream.host.trace import Trace
from sidestream.side_network.bundle import state_digest

_log = logging.getLogger(__name__)
_PROGRESS_EVERY_S: Final = 5.0
_AT_ONCE: Final = 4
_STORAGE_RETRY_S: Final = 5.0
_PUBLISH_RETRY_S: Final = 1.0
_PUBLISH_RETRY_MOST_S: Final = 60.0


class Learner:
    """Keeps the weights up with the journal.

    Args:
        config: Cadences.
        journal: What to fold; idle records are appended to it.
        publisher: Where versions go.
        metrics: Counts updates.
        online: How many devices are online by tier, asked for whenever weights are published.
        directory: Where checkpoints are kept.
        trace: Told what is done when.
        judge: Told of each batch's tier, stream, and loss before it was learnt.
    """

    def __init__(
        self,
        *,
        config: TrainerConfig,
        journal: Journal,
        publisher: Publisher,
        metrics: TrainerMetrics,
        online: Callable[[], Mapping[str, int]] = dict,
        directory: Path,
        trace: Trace,
        judge: Callable[[str, str, float], None] = lambda tier, stream, loss: None,
    ) -> None:
        self._config = config
        self._journal = journal
        self._publisher = publisher
        self._metrics = metrics
        self._online = online
        self._directory = directory
        self._trace = trace
        self._judge = judge
        self._wake = threading.Event()
        self._fold = Fold(journal, cache_bytes=config.cache_mib * 2**20)
        found = resume(directory, self._fold, journal.run, journal.tail)
        if found is not None:
            _log.info("resumed at record %d of %d", found.about.offset, journal.tail)
        self._published: Mapping[str, Floats] = {}
        self._published_offset = -1
        self._published_tiers: set[str] = set()
        self._tried_at = 0.0
        self._published_at = 0.0
        self._checkpointed_offset = self._fold.offset
        self._checkpointed_at = time.monotonic()
        self._last_batch_at = time.monotonic()
        self._republish = False
        self._retry_s = 0.0  # after a version that could not be published: until it is tried again
        self._pending: Version | None = None
        self._told = time.monotonic()

    # --- seen from other threads ---------------------------------------------------------------------

    def wake(self, connected: bool) -> None:
        """There is something new: records or a plan, or a fresh connection that needs the weights again."""
        if connected:
            self._republish, self._retry_s = True, 0.0
        self._wake.set()

    def reconfigure(self, config: TrainerConfig) -> None:
        """Go on with other cadences."""
        self._config = config

    @property
    def version(self) -> int:
        """Journal records folded in, and what a rebuild has added to that."""
        return self._journal.version_base + self._fold.offset

    @property
    def backlog(self) -> int:
        """Journal records not folded in yet."""
        return self._journal.tail - self._fold.offset

    @property
    def final(self) -> bool:
        """Whether nothing is left to learn."""
        return self.backlog == 0 and self._fold.samples > 0 and self._budget() <= 0

    # --- the thread ----------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Learn until stopped, then checkpoint."""
        while not stop.is_set():
            busy = self._catch_up(stop)
            try:
                busy = busy or self._idle()
                self._publish_if_due()
            except StateError as exc:
                _log.error("%s; trying again in %.0f s", exc, _STORAGE_RETRY_S)
                stop.wait(_STORAGE_RETRY_S)
            self._checkpoint_if_due()
            self._metrics.learner_backlog_records.set(self.backlog)
            self._metrics.head_bytes.set(self._fold.method.head_bytes if self._fold.begun else 0)
            if not busy:
                self._wake.wait(0.1)
                self._wake.clear()
        self._checkpoint()

    def _catch_up(self, stop: threading.Event) -> bool:
        """Fold some of the records that follow; return whether there were any."""
        records = self._journal.read(self._fold.offset, limit=_AT_ONCE)
        for record in records:
            if stop.is_set():
                break
            self._apply(record)
        return bool(records)

    def _apply(self, record: Record) -> None:
        started, began = time.monotonic(), self._trace.now()
        step = self._fold.apply(record)
        if step.updates:
            name = "update" if record.kind == "batch" else "idle updates"
            self._trace.add(name, "learner", began, record=record.offset, updates=step.updates)
        if record.kind == "batch":
            self._last_batch_at = time.monotonic()
        self._count(record, step, time.monotonic() - started)

    def _count(self, record: Record, step: Step, seconds: float) -> None:
        metrics = self._metrics
        if step.updates:
            metrics.update_seconds.observe(seconds / step.updates)
        if record.kind == "batch":
            metrics.updates.labels(Source.UPLOAD).inc()
            metrics.updates.labels(Source.REPLAY).inc(step.updates - 1)
            for tier, loss in step.losses.items():
                metrics.observe_loss(tier, loss)
                if record.stream is not None:
                    self._judge(tier, record.stream, loss)
        elif record.kind == "idle":
            metrics.updates.labels(Source.IDLE).inc(step.updates)
        if time.monotonic() - self._told > _PROGRESS_EVERY_S and step.updates:
            self._told = time.monotonic()
            _log.info(
                "version %d, %d behind; %d samples; loss %s",
                *(self.version, self.backlog, self._fold.samples),
                ", ".join(f"{tier} {loss:.3f}" for tier, loss in step.losses.items()),
            )

    # --- idle passes ---------------------------------------------------------------------------------

    def _budget(self) -> int:
        """Rows that the passes still owe."""
        return self._fold.method.owed(self._config.learner.passes)

    def _idle(self) -> bool:
        """Train a slice over the journal when nothing has arrived for a while; return whether it did."""
        quiet = time.monotonic() - self._last_batch_at >= self._config.idle_after_s
        if not quiet or self._fold.samples == 0 or self._budget() <= 0:
            return False
        learner = self._config.learner
        slice_ = self._fold.method.next_idle(learner.passes, learner.pass_rows, self._fold.offset)
        offset = self._journal.append(RecordKind.IDLE.value, msgspec.json.encode(slice_))
        # A batch may have been journaled in between: records are folded in the journal's order.
        if offset == self._fold.offset + 1:
            self._apply(self._journal.get(offset))
        if self._budget() <= 0:
            self._metrics.passes.inc(self._config.learner.passes)
        return True

    # --- publishing ----------------------------------------------------------------------------------

    def _publish_if_due(self) -> None:
        """Publish the first version, a changed one at most every ``publish_every_s``, and the final one.

        None but a repeat before the last one can be everywhere.
        """
        offset, tiers = self.version, self._tiers
        if self._fold.updates == 0 or offset < max(self._journal.published, default=0):
            return
        if time.monotonic() - self._tried_at < self._retry_s:
            return
        again = self._republish or tiers != self._published_tiers
        final = self.final and offset > self._published_offset
        now = time.monotonic()
        wait_s = _PUBLISH_RETRY_S if again else self._config.publish_every_s
        if not final and now - self._tried_at < wait_s:
            return
        if not again and now - self._published_at < self._spreading_s():
            return
        if again or final or offset > self._published_offset:
            self._publish(forced=again or final)

    def _spreading_s(self) -> float:
        """How long the last version takes to reach the devices that are online now, at the rate allowed."""
        rate = self._config.max_down_mib_s * 2**20
        online = self._online()
        total = sum(size * online.get(tier, 0) for tier, size in self._publisher.sizes.items())
        return total / rate if rate else 0.0

    def _publish(self, *, forced: bool) -> None:
        weights = self._fold.weights()
        if not forced and not self._changed(weights):
            self._tried_at = time.monotonic()
            return
        version = self._made_version(weights)
        self._tried_at = self._published_at = time.monotonic()
        self._republish = False  # before publishing: a connection that comes up meanwhile asks for it again
        began = self._trace.now()
        done = self._publisher.publish(version, self._config.job)
        self._trace.add("publish", "learner", began, version=version.number, final=version.final)
        if not done:
            self._republish = True
            self._retry_s = min(max(_PUBLISH_RETRY_S, 2 * self._retry_s), _PUBLISH_RETRY_MOST_S)
        else:
            self._pending, self._retry_s = None, 0.0
            self._published = weights
            self._published_offset = version.number
            self._published_tiers = self._tiers
            if version.final:
                _log.info("version %d is final: %d samples learnt", version.number, version.samples)

    @property
    def _tiers(self) -> set[str]:
        return set(self._fold.facts.tiers) if self._fold.begun else set()

    def _made_version(self, weights: Mapping[str, Floats]) -> Version:
        """Today's version; the one that could not be published yet, as long as nothing has changed."""
        pending = self._pending
        if pending is None or (pending.number, pending.final) != (self.version, self.final):
            codec = self._config.weights_codec
            self._pending = pending = Version(
                number=self.version,
                bundles=self._fold.method.bundles(self._journal.run, self.version, codec),
                state_digest=state_digest(weights),
                samples=self._fold.samples,
                final=self.final,
            )
        return pending

    def _changed(self, weights: Mapping[str, Floats]) -> bool:
        """Whether the weights moved enough since the last version to be worth every device's downlink."""
        if weights.keys() != self._published.keys():
            return True
        moved = sum(float(np.sum((weights[name] - old) ** 2)) for name, old in self._published.items())
        size = sum(float(np.sum(old**2)) for old in self._published.values())
        return moved >= self._config.publish_change**2 * size

    # --- checkpoints ---------------------------------------------------------------------------------

    def _checkpoint_if_due(self) -> None:
        due = time.monotonic() - self._checkpointed_at >= self._config.checkpoint_every_s
        if due or (self.final and self._fold.offset > self._checkpointed_offset):
            self._checkpoint()

    def _checkpoint(self) -> None:
        self._checkpointed_at = time.monotonic()
        if self._fold.offset == self._checkpointed_offset:
            return
        try:
            about = write_checkpoint(self._directory, self._fold, self._journal.run)
        except OSError as exc:
            _log.error("no checkpoint was written (%s); a restart will fold more of the journal again", exc)
            return
        self._checkpointed_offset = about.offset
        self._metrics.checkpoint_seconds.observe(time.monotonic() - self._checkpointed_at)
        self._metrics.checkpoint_timestamp.set_to_current_time()
