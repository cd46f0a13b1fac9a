"""Samples to batches: split off the held-out share, forward once, sample, quantise, into the outbox.

Runs on a thread of its own, so that forward passes overlap with sending. Knows no network.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from contract.errors import StorageError
from contract.messages import ActivationBatch, to_bin
from contract.plan import DEFAULT_LADDER, Plan, Rung, TierPlan, labels_id
from contract.sampling import Sampling, parse_sampling
from contract.tasks import TASKS, Task
from contract.tensors import encode, encoded_sizes
from contract.wire import pack
from edge_agent.budget import Ladder, LinkBudget, SampleBudget
from edge_agent.outbox import Outbox, Slot, Taken
from edge_agent.samples import Sample, Text, is_held_out
from edge_agent.sources import Source
from edge_agent.taps import Sampled
from edge_agent.targets import Target, Unusable, targets_of
from host.trace import Trace
from metrics.catalogue import AgentMetrics

if TYPE_CHECKING:
    from edge_agent.backbone import Backbone

_LOOK_AHEAD = 4  # batches; samples of similar length are computed together
_HEADER_BYTES = 1024  # what a message holds beside its arrays, at most
_SAVE_EVERY = 256  # samples set aside between two transactions
_WAIT_S = 0.1
_STORAGE_RETRY_S = 2.0
T = TypeVar("T")
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
            rungs = plan.tiers[tier].ladder or DEFAULT_LADDER
        self._makers = [BatchMaker(backbone, plan, tier, max_message_bytes, rung) for rung in rungs]
        self._maker = self._makers[0]
        self._ladder = Ladder(
            len(rungs),
            sample=SampleBudget(bytes_per_sample) if bytes_per_sample else None,
            link=link,
            backlog=lambda: outbox.size()[1],
        )
        self._targets = targets_of(plan.task, plan.labels)
        self._told: set[str] = set()
        self._pool: list[_Ready] = []
        self._waiting: set[bytes] = set()  # keys in the pool or in _taken: neither computed nor consumed yet
        self._taken = Taken()

    def run(self) -> None:
        """Produce until the source has ended.

        Raises:
            DataError: the source cannot be read.
            StateError: the outbox cannot be written.
        """
        try:
            self._work_off()
        finally:
            self._save()
            self._source.give_back([ready.sample for ready in self._pool])

    def _work_off(self) -> None:
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
        if sample.key in self._waiting or self._outbox.is_consumed(sample.key):
            return
        self._waiting.add(sample.key)
        if is_held_out(sample.row, self._held_out_share):
            self._set_aside(sample, "samples_held_out")
            return
        try:
            self._pool.append(_Ready(sample, self._target_of(sample)))
        except Unusable as exc:
            self._tell_unusable(str(exc))
            self._set_aside(sample, "samples_skipped")
        if len(self._pool) >= _LOOK_AHEAD * self._batch_size:
            self._compute(self._pool)

    def _target_of(self, sample: Sample) -> Target:
        if not sample.text.strip():
            raise Unusable("a sample has no text")
        if sample.label is None:
            raise Unusable("a sample has no label")
        return self._targets.read(sample.label, sample.text)

    def _tell_unusable(self, why: str) -> None:
        """Say once for each of the first few reasons why samples are skipped."""
        if why in self._told or len(self._told) >= _TOLD:
            return
        self._told.add(why)
        more = "; further ones are only counted" if len(self._told) == _TOLD else ""
        log.warning("samples are skipped: %s%s", why, more)

    def _set_aside(self, sample: Sample, reason: str) -> None:
        """Consume a sample that is not uploaded."""
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

    def _compute(self, pool: list[_Ready]) -> None:
        """Batch, forward and append everything in the pool, similar lengths together."""
        pool.sort(key=lambda ready: ready.sample.row.characters)
        for start in range(0, len(pool), self._batch_size):
            while not self._outbox.has_room() and not self._stopped():
                time.sleep(_WAIT_S)
            if self._stopped():
                return
            self._forward(pool[start : start + self._batch_size])
        pool.clear()

    def _forward(self, batch: Sequence[_Ready]) -> None:
        samples = [ready.sample for ready in batch]
        started = self._trace.now()
        sampled = self._makers[0].run([sample.row.input for sample in samples], self._choose)
        ended = self._trace.now()
        self._metrics.batch_forward_seconds.observe(sampled.seconds)
        maker = self._maker
        usable = sampled.usable_rows().numpy() & maker.fits(sampled)
        if not usable.all():
            self._refuse([sample for sample, good in zip(samples, usable, strict=True) if not good])
        batches: list[int] = []
        if usable.any():
            rows = np.flatnonzero(usable)
            batches = self._append(maker, sampled, batch, rows)
        self._trace.add("forward", "compute", started, ended, batches=batches, samples=len(samples))

    def _choose(self, lengths: npt.NDArray[np.int64]) -> Sampling:
        """By which rung the batch in hand goes: that is known before it is computed."""
        costs = [one.body_bytes(lengths) for one in self._makers]
        self._maker = self._makers[self._ladder.choose(costs, len(lengths))]
        return self._maker.sampling

    def _refuse(self, samples: Sequence[Sample]) -> None:
        log.warning(
            "%d samples skipped: their activations are not finite, or too large to send", len(samples)
        )
        for sample in samples:
            self._taken.counts["samples_forwarded"] += 1
            self._set_aside(sample, "samples_skipped")

    def _append(
        self,
        maker: BatchMaker,
        sampled: Sampled,
        batch: Sequence[_Ready],
        rows: npt.NDArray[np.int64],
    ) -> list[int]:
        """Put rows into the outbox; return the sequence numbers they got."""
        sequences: list[int] = []
        targets = [ready.target for ready in batch]
        for part in maker.split(sampled, rows):
            taken, self._taken = self._taken, Taken()
            taken.keys += [batch[row].sample.key for row in part]
            taken.counts.update({"samples_read": len(part), "samples_forwarded": len(part)})
            taken.forward_seconds += sampled.seconds * len(part) / len(rows)
            packer = self._packer(maker, sampled, targets, part)
            sequences += (done := self._patiently(partial(self._outbox.append, packer, len(part), taken)))
            if not done:
                break
            self._waiting.difference_update(taken.keys)
            self._on_batch()
        return sequences

    def _packer(
        self,
        maker: BatchMaker,
        sampled: Sampled,
        targets: Sequence[Target],
        part: npt.NDArray[np.int64],
    ) -> Callable[[Slot], bytes]:
        """As the maker's, and the ladder is told what the message took."""
        packed = maker.packer(sampled, targets, part)
        body = maker.body_bytes(sampled.mask[part].sum(dim=1).numpy())

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


class _Ready(NamedTuple):
    """A sample that can be computed."""

    sample: Sample
    target: Target


class BatchMaker:
    """Everything about a message but its place in the stream, as the plan asks for it.

    Args:
        backbone: The frozen transformer.
        plan: The job, ready for the tier.
        tier: This device's tier.
        max_message_bytes: No message is larger.
        rung: Sample and quantise by this, and not as the tier does.
    """

    def __init__(
        self, backbone: Backbone, plan: Plan, tier: str, max_message_bytes: int, rung: Rung | None = None
    ) -> None:
        self._backbone = backbone
        self._tier: TierPlan = plan.tiers[tier]
        self._rung = rung or Rung(sampling=self._tier.sampling, codec=self._tier.codec)
        self.sampling = parse_sampling(self._rung.sampling)
        """Which tokens travel."""
        self._labels_id = labels_id(plan.labels)
        self._form = TASKS[plan.task].form
        self._words = plan.task is Task.TOKEN_CLASSIFICATION
        self.targets = targets_of(plan.task, plan.labels)
        """What samples are to be answered with."""
        self._most_bytes = max_message_bytes - _HEADER_BYTES

    def forward(self, texts: Sequence[Text]) -> Sampled:
        """The one forward pass of these texts, sampled as the rung says."""
        return self.run(texts, lambda lengths: self.sampling)

    def run(self, texts: Sequence[Text], choose: Callable[[npt.NDArray[np.int64]], Sampling]) -> Sampled:
        """The one forward pass of these texts, sampled as ``choose`` says by their lengths in vectors."""
        tier = self._tier
        return self._backbone.forward(texts, tier.taps, tier.max_tokens, choose, words=self._words)

    def body_bytes(self, lengths: npt.NDArray[np.int64]) -> float:
        """What the arrays of rows with so many tokens take; infinite if one row alone fits no message."""
        vectors = lengths if self.sampling.kind == "all" else np.minimum(lengths, self.sampling.count)
        if self._size(1, int(vectors.max())) > self._most_bytes:
            return math.inf
        return self._size(len(lengths), int(vectors.sum()))

    def fits(self, sampled: Sampled) -> npt.NDArray[np.bool_]:
        """[K]: rows that fit a message on their own."""
        lengths = sampled.mask.sum(dim=1).tolist()
        return np.array([self._size(1, length) <= self._most_bytes for length in lengths])

    def split(self, sampled: Sampled, rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Cut rows into runs that fit a message, by halves."""
        vectors = int(sampled.mask[rows].sum())
        if len(rows) == 1 or self._size(len(rows), vectors) <= self._most_bytes:
            yield rows
            return
        middle = len(rows) // 2
        yield from self.split(sampled, rows[:middle])
        yield from self.split(sampled, rows[middle:])

    def packer(
        self, sampled: Sampled, targets: Sequence[Target], rows: npt.NDArray[np.int64]
    ) -> Callable[[Slot], bytes]:
        """Quantise some rows now; the outbox asks for the message once their place is known."""
        chosen = sampled.select(torch.from_numpy(rows))
        vectors, lengths = chosen.ragged()
        tensor = encode(vectors, self._rung.codec)
        packed_targets = self.targets.pack(self.targets.stack([targets[row] for row in rows], chosen))

        def packed(slot: Slot) -> bytes:
            batch = ActivationBatch(
                stream=slot.stream,
                sequence=slot.sequence,
                floor=slot.floor,
                fingerprint=self._backbone.fingerprint,
                labels_id=self._labels_id,
                taps=self._tier.taps,
                sampling=self._rung.sampling,
                samples=to_bin(np.arange(slot.first_sample, slot.first_sample + len(rows)), "<u4"),
                lengths=to_bin(lengths, "<u2"),
                targets=packed_targets,
                target_form=self._form,
                activations=tensor,
            )
            return pack(batch)

        return packed

    def _size(self, rows: int, vectors: int) -> int:
        shape = (len(self._tier.taps), vectors, self._backbone.width)
        return sum(encoded_sizes(self._rung.codec, shape)) + 8 * rows
