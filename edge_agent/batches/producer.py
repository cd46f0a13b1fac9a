"""Samples to batches: split off the held-out share, forward once, sample, quantise, into the outbox.

Runs on a thread of its own, so that forward passes overlap with sending. Knows no network.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edge_agent.batches import coded as kept
from edge_agent.batches.batch_maker import BatchMaker, Ready
from edge_agent.batches.targets import Unusable
from edge_agent.batches.token_maker import maker_of
from edge_agent.samples.sample import Sample, is_held_out
from edge_agent.samples.sources import Source
from edge_agent.store.budget import Ladder, LinkBudget, SampleBudget
from edge_agent.store.outbox import Outbox, Taken
from edge_agent.store.streams import Slot
from edge_agent.store.unlabelled import Kept
from metrics.catalogue import AgentMetrics
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.sampled import Sampled
from sidestream.backbone.text import Text
from sidestream.contract.errors import StorageError
from sidestream.contract.plan import Plan, Rung
from sidestream.contract.sampling import Sampling
from sidestream.contract.tasks import TASKS
from sidestream.host.trace import Trace

_LOOK_AHEAD = 4  # batches; samples of similar length are computed together
_SAVE_EVERY = 256  # samples set aside between two transactions
_WAIT_S = 0.1
_STORAGE_RETRY_S = 2.0
T = TypeVar("T")
_JUDGED_BY = 8  # texts that a tokenizer is judged by, where the source showed none beforehand
_TOLD = 5  # labels unknown to the job that are named in the log
log = logging.getLogger(__name__)


class Producer:
    """Turns a source's samples into batches until the source ends or it is stopped.

    Args:
        source: Where samples come from.
        outbox: Where batches go; knows which samples were consumed.
        backbone: The frozen transformer.
        plan: The job, ready for the tier.
        tier: This device's tier.
        held_out_share: Share of the samples that is set aside.
        poll_s: How often a source that has not ended is asked again.
        max_message_bytes: Larger batches are split.
        stopped: Asked often; true ends :meth:`run`.
        on_batch: Called after each batch.
        metrics: Told how long forward passes take.
        trace: Told what is done when.
        bytes_per_sample: The device's budget for samples; 0 for none.
        link: Its budget for the link, if it has one.
    """

    def __init__(
        self,
        source: Source,
        outbox: Outbox,
        backbone: Backbone,
        plan: Plan,
        tier: str,
        *,
        held_out_share: float,
        poll_s: float,
        max_message_bytes: int,
        stopped: Callable[[], bool],
        on_batch: Callable[[], None],
        metrics: AgentMetrics,
        trace: Trace,
        bytes_per_sample: int = 0,
        link: LinkBudget | None = None,
    ) -> None:
        self._trace = trace
        self._source = source
        self._outbox = outbox
        self._held_out_share = held_out_share
        self._poll_s = poll_s
        self._stopped = stopped
        self._on_batch = on_batch
        self._metrics = metrics
        self._batch_size = plan.tiers[tier].batch_size
        rungs: tuple[Rung | None, ...] = (None,)
        if bytes_per_sample or link is not None:
            rungs = plan.tiers[tier].rungs(plan.task)
        self._makers = [maker_of(backbone, plan, tier, max_message_bytes, rung) for rung in rungs]
        self._maker = self._makers[0]
        self._backbone = backbone
        self._first: list[Text] | None = None if source.first_texts() else []
        self._ladder = Ladder(
            len(rungs),
            sample=SampleBudget(bytes_per_sample) if bytes_per_sample else None,
            link=link,
            backlog=lambda: outbox.size()[1],
        )
        self._needs_labels = not TASKS[plan.task].generates
        self._waiting_max_bytes = outbox.unlabelled_max_bytes if self._needs_labels else 0
        self._made_by = kept.made_by(plan.tiers[tier], plan.task)
        self._again: set[bytes] = set()  # keys of samples that wait for a label, and for activations
        self._told: set[str] = set()
        self._pool: list[Ready] = []
        self._waiting: set[bytes] = set()  # keys in the pool or in _taken: neither computed nor consumed yet
        self._taken = Taken()

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
            self._save()
            self._source.give_back([ready.sample for ready in self._pool])

    def _work_off(self) -> None:
        self._renew_kept()
        while not self._stopped():
            for sample in self._source.read():
                self._take(sample)
                if self._stopped():
                    return
            self._compute(self._pool)
            self._save()
            if self._source.ended:
                return
            self._pause(self._poll_s)

    def _take(self, sample: Sample) -> None:
        if self._is_known(sample.key):
            return
        waits = sample.label is None and bool(sample.text.strip()) and self._waiting_max_bytes > 0
        if sample.label is None and self._needs_labels:
            self._tell_lacking()
        if is_held_out(sample.row, self._held_out_share) and not waits:
            self._set_aside(sample, "samples_held_out")
            return
        try:
            ready = [_waiting(sample)] if waits else self._maker.ready(sample)
        except Unusable as exc:
            self._tell_unusable(str(exc))
            self._set_aside(sample, "samples_skipped")
            return
        fresh = [one for one in ready if not self._is_known(one.key)]
        self._waiting.update(one.key for one in fresh)
        self._pool += fresh
        if len(self._pool) >= _LOOK_AHEAD * self._batch_size:
            self._compute(self._pool)

    def _is_known(self, key: bytes) -> bool:
        return key in self._waiting or self._outbox.is_consumed(key)

    def _renew_kept(self) -> None:
        """Compute anew what was kept for another backbone or other taps."""
        if not self._waiting_max_bytes:
            return
        samples = [sample for found in self._patiently(self._without_activations) for sample in found]
        self._again = {sample.key for sample in samples}
        step = _LOOK_AHEAD * self._batch_size
        for start in range(0, len(samples), step):
            self._compute([_waiting(sample) for sample in samples[start : start + step]])

    def _without_activations(self) -> list[Sample]:
        with self._outbox.unlabelled(writes=True) as store:
            if stale := store.clear_stale(self._made_by):
                log.warning("the plan has changed: %d samples that wait for a label are computed anew", stale)
            return store.without_activations()

    def _tell_lacking(self) -> None:
        """Say once where labels were looked for."""
        if (lacking := self._source.lacking) and lacking not in self._told:
            self._told.add(lacking)
            log.warning("%s; such rows wait for a label", lacking)

    def _tell_unusable(self, why: str) -> None:
        """Say once for each of the first few reasons why samples are skipped."""
        if why in self._told or len(self._told) >= _TOLD:
            return
        self._told.add(why)
        more = "; further ones are only counted" if len(self._told) == _TOLD else ""
        log.warning("samples are skipped: %s%s", why, more)

    def _set_aside(self, sample: Sample, reason: str) -> None:
        """Consume a sample that is not uploaded."""
        self._waiting.add(sample.key)
        self._taken.keys.append(sample.key)
        self._taken.counts.update({"samples_read": 1, reason: 1})
        if reason == "samples_held_out":
            self._taken.held_out.append(sample)
        if len(self._taken.keys) >= _SAVE_EVERY:
            self._save()

    def _save(self) -> None:
        if self._taken.keys:
            if not self._patiently(partial(self._outbox.consume, self._taken)):
                return
            self._waiting.difference_update(self._taken.keys)
            self._taken = Taken()

    def _compute(self, pool: list[Ready]) -> None:
        """Batch, forward and append everything in the pool, similar lengths together."""
        self._judge(pool)
        pool.sort(key=lambda ready: ready.length)
        for waits in (False, True):
            group = [ready for ready in pool if ready.waits is waits]
            for start in range(0, len(group), self._batch_size):
                while not self._outbox.has_room() and not self._stopped():
                    time.sleep(_WAIT_S)
                if self._stopped():
                    return
                self._forward(group[start : start + self._batch_size])
        pool.clear()

    def _judge(self, pool: Sequence[Ready]) -> None:
        """See once whether the tokenizer knows the texts, where that could not be seen before."""
        if self._first is None:
            return
        self._first += [one.sample.row.input for one in pool]
        if len(self._first) >= _JUDGED_BY:
            self._backbone.check_texts(self._first)
            self._first = None

    def _forward(self, batch: Sequence[Ready]) -> None:
        started = self._trace.now()
        sampled = self._makers[0].compute(batch, self._choose)
        ended = self._trace.now()
        self._metrics.batch_forward_seconds.observe(sampled.seconds)
        owners = np.arange(len(batch)) if sampled.owners is None else sampled.owners
        broken = set(owners[~(sampled.usable_rows() & self._maker.fits(sampled))].tolist())
        if broken:
            self._refuse([batch[owner] for owner in sorted(broken)])
        rows = np.array([row for row, owner in enumerate(owners.tolist()) if owner not in broken], int)
        batches: tuple[list[int], ...] = ()
        if len(rows) and batch[0].waits:
            self._keep(sampled, batch, rows)
        elif len(rows):
            batches = self._append(sampled, batch, owners, rows)
        told = [sequence for sequences in batches for sequence in sequences]
        self._trace.add("forward", "compute", started, ended, batches=told, samples=len(batch))

    def _choose(self, lengths: npt.NDArray[np.int64]) -> Sampling:
        """By which rung the batch in hand goes: that is known before it is computed."""
        costs = [one.body_bytes(lengths) for one in self._makers]
        self._maker = self._makers[self._ladder.choose(costs, len(lengths))]
        return self._maker.sampling

    def _refuse(self, batch: Sequence[Ready]) -> None:
        log.warning("%d samples skipped: their activations are not finite, or too large to send", len(batch))
        for ready in batch:
            if ready.key in self._again:
                self._patiently(partial(self._forget, ready.key))
                continue
            self._taken.counts["samples_forwarded"] += 1
            self._set_aside(ready.sample._replace(key=ready.key), "samples_skipped")

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
    ) -> tuple[list[int], ...]:
        """Put rows into the outbox, all of them at once: a sample is never there in part.

        Args:
            sampled: The batch as it was computed.
            batch: The batch.
            owners: Whose each row of ``sampled`` is.
            rows: The usable ones.

        Returns:
            The sequence numbers that they got; nothing if we were stopped before that.
        """
        taken, self._taken = self._taken, Taken()
        taken.keys += [batch[owner].key for owner in dict.fromkeys(owners[rows].tolist())]
        taken.counts.update({"samples_read": len(rows), "samples_forwarded": len(rows)})
        taken.forward_seconds += sampled.seconds
        targets = [batch[owner].target for owner in owners.tolist()]
        keys = self._keys(batch, owners)
        parts = [
            (self._packer(self._maker, sampled, targets, part, keys), len(part))
            for part in self._maker.split(sampled, rows)
        ]
        done = self._patiently(partial(self._outbox.append_all, parts, taken))
        if done:
            self._waiting.difference_update(taken.keys)
            self._on_batch()
        return done

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
        taken = Taken(forward_seconds=sampled.seconds)
        for row in rows.tolist():
            sample, again = batch[row].sample, batch[row].key in self._again
            held_out = is_held_out(sample.row, self._held_out_share)
            activations = self._maker.keep(sampled, row)
            taken.kept.append(Kept(sample, held_out, self._made_by, activations, again))
            if not again:
                taken.keys.append(sample.key)
                taken.counts.update({"samples_read": 1, "samples_unlabelled": 1})
                taken.counts["samples_held_out"] += held_out
        if self._patiently(partial(self._outbox.consume, taken)):
            self._waiting.difference_update(taken.keys)
            self._ladder.set_aside(self._maker.body_bytes(sampled.lengths[rows]), len(rows))

    def _packer(
        self,
        maker: BatchMaker,
        sampled: Sampled,
        targets: Sequence[Any],
        part: npt.NDArray[np.int64],
        keys: Sequence[bytes],
    ) -> Callable[[Slot], bytes]:
        """As the maker's, and the ladder is told what the message took."""
        packed = maker.packer(sampled, targets, part, [keys[row] for row in part.tolist()])
        body = maker.body_bytes(sampled.lengths[part])

        def counted(slot: Slot) -> bytes:
            payload = packed(slot)
            self._ladder.spent(len(payload), body, len(part))
            return payload

        return counted

    def _patiently(self, write: Callable[[], T]) -> tuple[T, ...]:
        """Write to the outbox; where the disk cannot take it, wait and try again.

        Returns:
            What ``write`` returned, alone; nothing if we were stopped before that.
        """
        told = False
        while True:
            try:
                return (write(),)
            except StorageError as exc:
                if not told:
                    log.error("%s; computing waits until then, and nothing is lost", exc)
                told = True
            if self._stopped():
                return ()
            self._pause(_STORAGE_RETRY_S)

    def _pause(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while not self._stopped() and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(_WAIT_S, left_s))


def _waiting(sample: Sample) -> Ready:
    """A sample whose label may come later."""
    return Ready(sample, sample.key, None, sample.row.characters)
