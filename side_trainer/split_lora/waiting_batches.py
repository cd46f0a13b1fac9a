"""Batches that wait to be served: decoded as they arrive while there is room, from the journal later."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from side_trainer.journal.journal import Journal, Record
from side_trainer.split_lora.served_batch import ServedBatch
from sidestream.contract.messages import ActivationBatch, Reuse, StateChange, unpack_adapter
from sidestream.contract.tensors import Floats, decode
from sidestream.contract.wire import unpack


class WaitingBatches:
    """Belongs to the learner.

    Args:
        journal: Where they are.
        max_bytes: Memory for those that are decoded.
    """

    def __init__(self, journal: Journal, max_bytes: int) -> None:
        self._journal = journal
        self._max_bytes = max_bytes
        self._bytes = 0
        self._decoded: dict[int, ServedBatch] = {}

    def arrived(self, record: Record) -> ActivationBatch:
        """Take in a batch; return it as it was sent."""
        handed = self._journal.decoded.take(record.offset)
        if handed is None:
            return unpack(ActivationBatch, record.payload)
        if self._bytes + handed.values.nbytes <= self._max_bytes:
            self._decoded[record.offset] = ServedBatch.of(handed)
            self._bytes += handed.values.nbytes
        return handed.batch

    def take(self, offset: int, source: int, changes: Sequence[int] = ()) -> ServedBatch:
        """The batch of a record, to be served now.

        Args:
            offset: The record.
            source: The one that has its activations.
            changes: Those of what is added to them, in this order. What is larger than all of them no honest
                device sends, for whole batches are judged by their size: it is left out.
        """
        found = self._decoded.pop(offset, None)
        if found is not None:
            self._bytes -= found.states.nbytes
            return found
        batch = ServedBatch.read(self._journal.get(source).payload)
        most = np.linalg.norm(batch.states)
        for one in changes:
            if np.linalg.norm(change := self._change(one)) <= most:
                np.add(batch.states, change, out=batch.states)
        return batch

    def _change(self, offset: int) -> Floats:
        message = unpack_adapter(self._journal.get(offset).payload)
        assert isinstance(message, Reuse) and isinstance(message.change, StateChange)
        return decode(message.change.tensor)
