"""Labels that came later become batches, from the activations that were kept: no forward pass is made.

Takes short turns on the thread that computes, and looks every second. Knows no network.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from edge_agent.batches.coded import KeptActivations, joined, made_by, read, sampled_of
from edge_agent.batches.message import HEADER_BYTES, ROW_BYTES, Letterhead
from edge_agent.batches.targets import Unusable, targets_of
from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.store.streams import Slot
from edge_agent.store.unlabelled import LabelChanged, Labelled
from sidestream.contract.errors import StorageError
from sidestream.contract.plan import Plan

_LOOK_S: Final = 1.0
_AT_ONCE: Final = 4  # batches; of the samples in them, those of one policy and codec go together
log = logging.getLogger(__name__)


class _Ready(NamedTuple):
    labelled: Labelled
    kept: KeptActivations
    target: Any


class LateLabels:
    """Takes labels up as they come.

    Args:
        outbox: Where samples and labels are, and batches go.
        plan: The job, ready for the tier.
        tier: This device's tier.
        max_message_bytes: No message is larger.
        on_batch: Called after each batch.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        outbox: Outbox,
        plan: Plan,
        tier: str,
        *,
        max_message_bytes: int,
        on_batch: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outbox = outbox
        self._targets = targets_of(plan.task, plan.labels)
        self._made_by = made_by(plan.tiers[tier], plan.task)
        self._letterhead = Letterhead.of(plan, tier)
        self._batch_size = plan.tiers[tier].batch_size
        self._most_bytes = max_message_bytes - HEADER_BYTES
        self._on_batch = on_batch
        self._clock = clock
        self._next_s = 0.0
        self._full = False  # the disk
        self._task, self._labels = plan.task, plan.labels
        self._told_job = False

    def turn(self) -> float:
        """Take up some labels, if it is time to look; return the seconds until it is time again.

        Raises:
            StateError: the outbox cannot be read.
        """
        if (left_s := self._next_s - self._clock()) > 0:
            return left_s
        try:
            if not self._told_job:
                self._tell_job()
            again, self._full = self.take_up(), False
        except StorageError as exc:
            if not self._full:
                log.error("%s; labels wait until then, and nothing is lost", exc)
            again, self._full = False, True
        if again:
            return 0.0
        self._next_s = self._clock() + _LOOK_S
        return _LOOK_S

    def _tell_job(self) -> None:
        with self._outbox.unlabelled(writes=True) as store:
            store.set_job(self._task, self._labels)
        self._told_job = True

    def take_up(self) -> bool:
        """Make one batch, if there are labels for one. Returns whether it is worth looking again at once."""
        with self._outbox.unlabelled() as store:
            found = store.labelled(self._made_by, _AT_ONCE * self._batch_size)
        if not found or not self._outbox.has_room():
            return False
        ready = list(self._usable(found))
        held_out = [one.labelled for one in ready if one.labelled.held_out]
        batch = self._chosen([one for one in ready if not one.labelled.held_out])
        try:
            if held_out:
                self._outbox.consume(
                    Consumed(labelled=held_out, counts=Counter(samples_held_out=len(held_out)))
                )
            if batch:
                self._append(batch)
        except LabelChanged:
            log.debug("a label was corrected meanwhile")
        return True

    def _usable(self, found: Sequence[Labelled]) -> Iterator[_Ready]:
        for one in found:
            label = one.row.label or ""
            try:
                yield _Ready(one, read(one.activations), self._targets.read(label, one.row.text))
            except Unusable as exc:
                log.warning("the label of sample %s is not used, and it waits for another: %s", one.id, exc)
                with self._outbox.unlabelled(writes=True) as store:
                    store.refuse(one.key, label, str(exc))

    def _chosen(self, ready: Sequence[_Ready]) -> list[_Ready]:
        """As many as fit a message, of one policy and codec; or one alone that cannot be joined to others."""
        chosen: list[_Ready] = []
        size = 0
        for one in ready:
            needed = one.kept.activations.nbytes + ROW_BYTES
            fits = len(chosen) < self._batch_size and size + needed <= self._most_bytes
            if not chosen or (fits and _alike(chosen[0].kept, one.kept)):
                chosen.append(one)
                size += needed
        return chosen

    def _append(self, batch: Sequence[_Ready]) -> None:
        kept = [one.kept for one in batch]
        stacked = self._targets.stack([one.target for one in batch], sampled_of(kept))
        targets, activations = self._targets.pack(stacked), joined(kept)
        keys = [self._outbox.name(one.labelled.key) for one in batch]

        def packed(slot: Slot) -> bytes:
            return self._letterhead.write(
                slot,
                sampling=kept[0].sampling,
                lengths=[one.length for one in kept],
                targets=targets,
                activations=activations,
                keys=keys,
            )

        taken = Consumed(labelled=[one.labelled for one in batch])
        taken.counts["samples_forwarded"] += len(batch)
        self._outbox.append_all([(packed, len(batch))], taken)
        self._on_batch()


def _alike(first: KeptActivations, other: KeptActivations) -> bool:
    return (
        first.joins
        and other.joins
        and (first.sampling, first.activations.codec) == (other.sampling, other.activations.codec)
    )
