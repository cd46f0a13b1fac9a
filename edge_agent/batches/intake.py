"""What becomes of each sample that is read: computed, held out, skipped, or known already."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Protocol

from edge_agent.batches.batch_maker import Ready
from edge_agent.batches.patience import Patience
from edge_agent.batches.targets import Unusable
from edge_agent.samples.sample import Sample, is_held_out, why_unreadable
from edge_agent.store.outbox import Consumed, Outbox

_SAVE_EVERY = 256  # samples set aside between two transactions
_FEW, _MANY = 10, 100  # samples read: up to the one, a share is a share of so many; from the other, of all
_TOLD = 5  # reasons why samples are skipped that are named in the log
log = logging.getLogger(__name__)


class Prepares(Protocol):
    """Says what of a sample is to be computed."""

    @property
    def needs_labels(self) -> bool:
        """Whether samples without a label are kept until one comes."""

    def ready(self, sample: Sample) -> Sequence[Ready]:
        """What of a sample is to be computed.

        Raises:
            Unusable: the job can do nothing with it.
        """


class Intake:
    """Remembers what was read until the outbox does.

    Args:
        outbox: Knows which samples were consumed.
        rungs: Say what of a sample is to be computed.
        patience: Writes to the outbox.
        held_out_share: Share of the samples that is set aside.
    """

    def __init__(self, outbox: Outbox, rungs: Prepares, patience: Patience, held_out_share: float) -> None:
        self.keeps_unlabelled = rungs.needs_labels and outbox.unlabelled_max_bytes > 0
        """Whether samples without a label are kept until one comes."""
        self._outbox = outbox
        self._rungs = rungs
        self._patience = patience
        self._held_out_share = held_out_share
        self._told: set[str] = set()
        self._unreadable = 0
        self._pending: set[bytes] = set()  # keys that were read and are not consumed yet
        self._taken = Consumed()

    def take(self, sample: Sample, lacking: str) -> list[Ready]:
        """What of a sample is to be computed.

        Args:
            sample: As it was read.
            lacking: In words, where a label was looked for in vain.
        """
        if self._is_known(sample.key):
            return []
        if sample.broken or self._is_unreadable(sample):
            self._set_aside(sample, "samples_broken")
            return []
        waits = sample.label is None and not sample.row.is_blank and self.keeps_unlabelled
        if sample.label is None and self._rungs.needs_labels and lacking and lacking not in self._told:
            self._told.add(lacking)
            log.warning("%s; such rows wait for a label", lacking)
        if self.is_held_out(sample) and not waits:
            self._taken.held_out.append(sample)
            self._set_aside(sample, "samples_held_out")
            return []
        try:
            ready = [waiting(sample)] if waits else self._rungs.ready(sample)
        except Unusable as exc:
            self._tell_unusable(str(exc))
            self.skip(sample, exc.counter)
            return []
        fresh = [one for one in ready if not self._is_known(one.key)]
        self._pending.update(one.key for one in fresh)
        return fresh

    def _is_unreadable(self, sample: Sample) -> bool:
        if why := why_unreadable(sample.input):
            self._unreadable += 1
            if self._unreadable <= _TOLD:
                more = "; further ones are only counted" if self._unreadable == _TOLD else ""
                log.warning("a sample is skipped: %s%s", why, more)
        return why != ""

    def is_held_out(self, sample: Sample) -> bool:
        """Whether it is for evaluation."""
        return is_held_out(sample.row, self._held_out_share) and not self._would_starve()

    def _would_starve(self) -> bool:
        """Of the first rows the hash may draw three of ten, and those that are left have to learn by."""
        counts = self._outbox.counters()
        read = counts["samples_read"] + len(self._pending)
        held = counts["samples_held_out"] + self._taken.counts["samples_held_out"]
        return read < _MANY and held >= math.ceil(self._held_out_share * max(_FEW, read + 1))

    def skip(self, sample: Sample, counter: str) -> None:
        """Consume a sample that the job can do nothing with; ``counter`` is the one that says why."""
        self._set_aside(sample, "samples_skipped", counter)

    def _set_aside(self, sample: Sample, *counters: str) -> None:
        self._pending.add(sample.key)
        self._taken.keys.append(sample.key)
        self._taken.counts.update(["samples_read", *counters])
        if len(self._taken.keys) >= _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Have the outbox remember what was set aside."""
        if self._taken.keys and self.consume(self._taken):
            self._taken = Consumed()

    def consume(self, taken: Consumed) -> bool:
        """Have it remember samples; whether it does."""
        if not self._patience.write(partial(self._outbox.consume, taken)):
            return False
        self.done_with(taken.keys)
        return True

    def hand_over(self) -> Consumed:
        """What was set aside, to be remembered in the transaction that appends a batch."""
        taken, self._taken = self._taken, Consumed()
        return taken

    def done_with(self, keys: Collection[bytes]) -> None:
        """The outbox knows these samples."""
        self._pending.difference_update(keys)

    def _is_known(self, key: bytes) -> bool:
        return key in self._pending or self._outbox.is_consumed(key)

    def _tell_unusable(self, why: str) -> None:
        """Say once for each of the first few reasons why samples are skipped."""
        if why in self._told or len(self._told) >= _TOLD:
            return
        self._told.add(why)
        more = "; further ones are only counted" if len(self._told) == _TOLD else ""
        log.warning("samples are skipped: %s%s", why, more)


def waiting(sample: Sample) -> Ready:
    """A sample whose label may come later."""
    return Ready(sample, sample.key, None, sample.row.size)
