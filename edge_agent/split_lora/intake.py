"""From a source's samples to batches that are kept: read, tokenised, set aside or put together by length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Final

from edge_agent.batches.batch_maker import Ready
from edge_agent.batches.intake import Intake
from edge_agent.batches.patience import Patience
from edge_agent.samples.sample import Sample
from edge_agent.samples.source import SampleSource
from edge_agent.split_lora.prepared import Preparer
from edge_agent.split_lora.stored_batches import StoredBatches
from edge_agent.split_lora.writing import Writer
from edge_agent.store.outbox import Outbox

_LOOK_AHEAD: Final = 4  # batches; samples of similar length are put together
_AT_ONCE: Final = 1024  # samples, before batches are sent again


class BatchIntake:
    """Belongs to one thread.

    Args:
        source: Where samples come from.
        outbox: Remembers which were read.
        preparer: Makes rows.
        writer: Says how large a batch is.
        batches: Where they go.
        batch_size: Rows.
        max_message_bytes: No batch is larger.
        held_out_share: Share of the samples that is set aside.
        patience: Writes to the outbox.
    """

    def __init__(
        self,
        source: SampleSource,
        outbox: Outbox,
        preparer: Preparer,
        writer: Writer,
        batches: StoredBatches,
        *,
        batch_size: int,
        max_message_bytes: int,
        held_out_share: float,
        patience: Patience,
    ) -> None:
        self._source = source
        self._outbox = outbox
        self._preparer = preparer
        self._writer = writer
        self._batches = batches
        self._size = batch_size
        self._most_bytes = max_message_bytes
        self._patience = patience
        self._intake = Intake(outbox, preparer, patience, held_out_share)
        self._reading: Iterator[Sample] | None = None
        self._pool: list[Ready] = []

    @property
    def ended(self) -> bool:
        """Whether every sample that can ever come is in a batch."""
        return self._source.ended and self._reading is None and not self._pool

    def read(self) -> bool:
        """Take in some of what is there now; return whether there was anything."""
        if self._reading is None:
            self._reading = self._source.read()
        samples = list(islice(self._reading, _AT_ONCE))
        for sample in samples:
            lacking = self._source.lacking if sample.label is None else ""
            self._pool += self._intake.take(sample, lacking)
        over = len(samples) < _AT_ONCE
        if over:
            self._reading = None
        self._put_together(all_of_it=over)
        if over:
            self._intake.save()
        return bool(samples)

    def give_back(self) -> None:
        """Nothing more is read now."""
        self._intake.save()
        self._source.give_back([ready.sample for ready in self._pool])

    def _put_together(self, *, all_of_it: bool) -> None:
        step = _LOOK_AHEAD * self._size
        while len(self._pool) >= step or (all_of_it and self._pool):
            group, self._pool = self._pool[:step], self._pool[step:]
            group.sort(key=lambda ready: ready.length)
            while group and not self._patience.stopped():
                count = self._fitting(group)
                self._keep(group[:count])
                group = group[count:]
            if self._patience.stopped():
                self._pool = [*group, *self._pool]
                return

    def _fitting(self, group: list[Ready]) -> int:
        """How many of the first make a batch; one that is too long for a message is a batch all the same."""
        tokens = 0
        for count, ready in enumerate(group[: self._size], start=1):
            tokens += ready.length
            if count > 1 and self._writer.size(count, tokens) > self._most_bytes:
                return count - 1
        return min(self._size, len(group))

    def _keep(self, group: list[Ready]) -> None:
        if len(group) == 1 and self._writer.size(1, group[0].length) > self._most_bytes:
            self._intake.skip(group[0].sample._replace(key=group[0].key), "skipped_activations")
            return
        taken = self._intake.hand_over()
        taken.keys += [ready.key for ready in group]
        names = [self._outbox.name(ready.key) for ready in group]
        body = self._preparer.body([ready.target for ready in group], names)
        add = partial(self._batches.add, body=body)
        if self._patience.write(partial(self._outbox.append_all, [], taken, add)):
            self._intake.done_with(taken.keys)
