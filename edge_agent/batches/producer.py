"""Samples to batches: forward each once, sample, quantise, into the outbox.

Runs on the thread that computes, so that forward passes overlap with sending. Knows no network.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from edge_agent.batches.batch_maker import Ready
from edge_agent.batches.intake import Intake, waiting
from edge_agent.batches.patience import Patience
from edge_agent.batches.rungs import Rungs
from edge_agent.samples.sample import Sample
from edge_agent.samples.source import SampleSource
from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.store.unlabelled import UnlabelledSample
from metrics.catalogue import AgentMetrics
from sidestream.backbone.inputs import Input
from sidestream.backbone.sampled import Sampled
from sidestream.host.trace import Trace

_LOOK_AHEAD = 4  # batches; samples of similar length are computed together
_WAIT_S = 0.1
_SIDE_TASKS_EVERY = 256  # samples that were perhaps known already
_JUDGED_BY = 8  # texts that a tokenizer is judged by, where the source showed none beforehand
log = logging.getLogger(__name__)


class Producer:
    """Turns a source's samples into batches until the source ends or it is stopped.

    Args:
        source: Where samples come from.
        outbox: Where batches go; knows which samples were consumed.
        rungs: Make the batches.
        held_out_share: Share of the samples that is set aside.
        poll_s: How often a source that has not ended is asked again.
        patience: Waits, and ends :meth:`run`.
        on_batch: Called after each batch.
        metrics: Told how long forward passes take.
        trace: Told what is done when.
    """

    def __init__(
        self,
        source: SampleSource,
        outbox: Outbox,
        rungs: Rungs,
        *,
        held_out_share: float,
        poll_s: float,
        patience: Patience,
        on_batch: Callable[[], None],
        metrics: AgentMetrics,
        trace: Trace,
    ) -> None:
        self._source = source
        self._outbox = outbox
        self._rungs = rungs
        self._patience = patience
        self._intake = Intake(outbox, rungs, patience, held_out_share)
        self._poll_s = poll_s
        self._on_batch = on_batch
        self._metrics = metrics
        self._trace = trace
        self._first: list[Input] | None = None if source.first_inputs() else []
        self._again: set[bytes] = set()  # keys of samples that wait for a label, and for activations
        self._pool: list[Ready] = []

    def run(self) -> None:
        """Produce until the source has ended.

        Raises:
            DataError: the source cannot be read.
            BackboneError: its tokenizer knows next to nothing of the source's first texts.
            StateError: the outbox cannot be written.
        """
        try:
            self._work_off()
        finally:
            self._intake.save()
            self._source.give_back([ready.sample for ready in self._pool])

    def _work_off(self) -> None:
        self._renew_kept()
        while not self._patience.stopped():
            for number, sample in enumerate(self._source.read()):
                if number % _SIDE_TASKS_EVERY == 0:
                    self._patience.between()
                lacking = self._source.lacking if sample.label is None else ""
                self._pool += self._intake.take(sample, lacking)
                if len(self._pool) >= _LOOK_AHEAD * self._rungs.batch_size:
                    self._compute(self._pool)
                if self._patience.stopped():
                    return
            self._compute(self._pool)
            self._intake.save()
            if self._source.ended:
                return
            self._patience.pause(self._poll_s)

    def _renew_kept(self) -> None:
        """Compute anew what was kept for another backbone or other taps."""
        if not self._intake.keeps_unlabelled:
            return
        samples = [sample for found in self._patience.write(self._without_activations) for sample in found]
        self._again = {sample.key for sample in samples}
        step = _LOOK_AHEAD * self._rungs.batch_size
        for start in range(0, len(samples), step):
            self._compute([waiting(sample) for sample in samples[start : start + step]])

    def _without_activations(self) -> list[Sample]:
        with self._outbox.unlabelled(writes=True) as store:
            if stale := store.clear_stale(self._rungs.made_by):
                log.warning("the plan has changed: %d samples that wait for a label are computed anew", stale)
            return store.without_activations()

    def _compute(self, pool: list[Ready]) -> None:
        """Batch, forward and append everything in the pool, similar lengths together."""
        self._judge(pool)
        pool.sort(key=lambda ready: ready.length)
        for waits in (False, True):
            group = [ready for ready in pool if ready.waits is waits]
            while group:
                while not self._outbox.has_room() and not self._patience.stopped():
                    self._patience.pause(_WAIT_S)
                if self._patience.stopped():
                    return
                size = self._rungs.batch_size  # it may be another one for every batch
                batch, group = group[:size], group[size:]
                self._forward(batch)
                self._patience.between()
        pool.clear()

    def _judge(self, pool: Sequence[Ready]) -> None:
        """See once whether the tokenizer knows the texts, where that could not be seen before."""
        if self._first is None:
            return
        self._first += [one.sample.input for one in pool]
        if len(self._first) >= _JUDGED_BY:
            self._rungs.backbone.check_inputs(self._first)
            self._first = None

    def _forward(self, batch: Sequence[Ready]) -> None:
        started = self._trace.now()
        sampled = self._rungs.compute(batch)
        ended = self._trace.now()
        self._metrics.batch_forward_seconds.observe(sampled.seconds)
        owners = np.arange(len(batch)) if sampled.owners is None else sampled.owners
        broken = set(owners[~self._rungs.usable(sampled)].tolist())
        if broken:
            self._refuse([batch[owner] for owner in sorted(broken)])
        rows = np.array([row for row, owner in enumerate(owners.tolist()) if owner not in broken], int)
        sequences: list[int] = []
        if len(rows) and batch[0].waits:
            self._keep(sampled, batch, rows)
        elif len(rows):
            sequences = self._append(sampled, batch, owners, rows)
        self._trace.add("forward", "compute", started, ended, batches=sequences, samples=len(batch))

    def _refuse(self, batch: Sequence[Ready]) -> None:
        log.warning("%d samples skipped: their activations are not finite, or too large to send", len(batch))
        for ready in batch:
            if ready.key in self._again:
                self._patience.write(partial(self._forget, ready.key))
            else:
                self._intake.skip(ready.sample._replace(key=ready.key), "skipped_activations")

    def _forget(self, key: bytes) -> None:
        with self._outbox.unlabelled(writes=True) as store:
            store.drop([key])
        self._outbox.count("unlabelled_dropped", 1)

    def _append(
        self,
        sampled: Sampled,
        batch: Sequence[Ready],
        owners: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
    ) -> list[int]:
        """Put rows into the outbox, all of them at once: a sample is never there in part.

        Args:
            sampled: The batch as it was computed.
            batch: The batch.
            owners: Whose each row of ``sampled`` is.
            rows: The usable ones.

        Returns:
            The sequence numbers that they got; none if we were stopped before that.
        """
        taken = self._intake.hand_over()
        taken.keys += [batch[owner].key for owner in dict.fromkeys(owners[rows].tolist())]
        taken.counts.update({"samples_read": len(rows), "samples_forwarded": len(rows)})
        taken.forward_seconds += sampled.seconds
        targets = [batch[owner].target for owner in owners.tolist()]
        parts = self._rungs.packers(sampled, targets, rows, self._keys(batch, owners))
        done = self._patience.write(partial(self._outbox.append_all, parts, taken))
        if done:
            self._intake.done_with(taken.keys)
            self._on_batch()
        return [sequence for sequences in done for sequence in sequences]

    def _keys(self, batch: Sequence[Ready], owners: npt.NDArray[np.int64]) -> list[bytes]:
        """By what the trainer knows each row again; a sample's rows are its parts, one after another."""
        parts: Counter[int] = Counter()
        keys = []
        for owner in owners.tolist():
            keys.append(self._outbox.name(batch[owner].key, parts[owner]))
            parts[owner] += 1
        return keys

    def _keep(self, sampled: Sampled, batch: Sequence[Ready], rows: npt.NDArray[np.int64]) -> None:
        """Keep rows of a batch whose labels may come later."""
        taken = Consumed(forward_seconds=sampled.seconds)
        for row, activations in zip(rows.tolist(), self._rungs.keep(sampled, rows), strict=True):
            sample, again = batch[row].sample, batch[row].key in self._again
            held_out = self._intake.is_held_out(sample)
            taken.kept.append(UnlabelledSample(sample, held_out, self._rungs.made_by, activations, again))
            if not again:
                taken.keys.append(sample.key)
                taken.counts.update({"samples_read": 1, "samples_unlabelled": 1})
        self._intake.consume(taken)
