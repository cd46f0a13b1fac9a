"""Batches on their way: put into the outbox, counted, and known to wait for an answer, in one transaction."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from edge_agent.batches.patience import Patience
from edge_agent.context import AgentContext
from edge_agent.split_lora.held_states import added_up, moved_share, sketch_of
from edge_agent.split_lora.stored_batches import Flight, StoredBatch, StoredBatches
from edge_agent.split_lora.writing import Pack, Writer
from edge_agent.store.outbox import Consumed
from sidestream.contract.messages import SplitPart, StateChange, states_digest
from sidestream.contract.tensors import Floats, Tensor

log = logging.getLogger(__name__)


class _Made(NamedTuple):
    """A message, and what is to be remembered of it."""

    pack: Pack
    """The message."""
    base: bytes
    """The ticket under which the trainer has the batch's states then,"""
    sketch: bytes
    """and what they are like."""
    counts: Mapping[str, int]
    """To be added to the counters."""
    tensor: Tensor | None = None
    """What was sent of them,"""
    number: int = 0
    """and whether that is the whole (0), or which of the changes since."""


class Departures:
    """Belongs to one thread.

    Args:
        context: The agent's.
        batches: What is sent.
        writer: Writes messages.
        reuse_below: States that moved by less are not sent again; 0 to send all.
        patience: Writes to the outbox.
        on_batch: Called after each message.
    """

    def __init__(
        self,
        context: AgentContext,
        batches: StoredBatches,
        writer: Writer,
        *,
        reuse_below: float,
        patience: Patience,
        on_batch: Callable[[], None],
    ) -> None:
        self._context = context
        self._batches = batches
        self._writer = writer
        self._reuse_below = reuse_below
        self._patience = patience
        self._on_batch = on_batch

    def depart(
        self,
        batch: StoredBatch,
        states: Floats,
        seconds: float,
        *,
        slot: int = 0,
        adapter: int = 0,
        number: int = 0,
        ended: bool,
        answered: bool,
    ) -> bytes:
        """Send a batch; return its ticket, empty if nothing came of it.

        Args:
            batch: Which.
            states: [N, d].
            seconds: That the forward pass took.
            slot: Where its answer is looked for.
            adapter: The weights version of the pass.
            number: The round of averaging that is on.
            ended: Whether no sample can come any more.
            answered: Whether it waits for an answer.
        """
        if not np.isfinite(states).all():
            self._refuse(batch)
            return b""
        ticket, rows = self._writer.ticket(batch), len(batch.body.ids)
        part = SplitPart(
            ticket=ticket,
            slot=slot,
            adapter=adapter,
            pass_number=batch.passes,
            progress=self.progress(ended),
            rows=rows,
            context=self._writer.context(batch),
            round=number,
        )
        made = self._made(batch, states, part)
        stream, taken = self._context.outbox.stream, Consumed(forward_seconds=seconds)
        fresh = 0 if batch.passes else rows
        taken.counts.update({"samples_read": fresh, "samples_forwarded": fresh, **made.counts})

        def also(db: sqlite3.Connection) -> None:
            if made.tensor is not None and self._writer.sends_changes:
                self._batches.held.put(db, batch.id, made.tensor, made.number)
            self._batches.sent(db, batch, made.base, made.sketch)
            if answered:
                self._batches.depart(db, Flight(ticket, batch.id, slot, adapter, stream))

        append = partial(self._context.outbox.append_all, [(made.pack, fresh)], taken, also)
        if not self._patience.write(append):
            return b""
        self._on_batch()
        return ticket

    def _made(self, batch: StoredBatch, states: Floats, part: SplitPart) -> _Made:
        """Nothing where states have hardly moved, else their change, else the whole."""
        sketch = sketch_of(states) if self._reuse_below and batch.base else b""
        if sketch and moved_share(batch.sketch, sketch) < self._reuse_below:
            pack = self._writer.reuse(part, batch.base)
            return _Made(pack, batch.base, batch.sketch, {"batches_reused": 1})
        held = self._batches.held.of(batch.id) if batch.base else ()
        if (tensor := self._writer.change(states, held)) is not None:
            change = StateChange(base=states_digest(held), tensor=tensor)
            pack = self._writer.reuse(part, batch.base, change)
            sketch = self._sketch([*held, tensor])
            return _Made(pack, part.ticket, sketch, {"batches_changed": 1}, tensor, len(held))
        tensor = self._writer.states(states)
        return _Made(self._writer.batch(batch, tensor, part), part.ticket, self._sketch([tensor]), {}, tensor)

    def _sketch(self, held: Sequence[Tensor]) -> bytes:
        """Of what the trainer has then."""
        return sketch_of(added_up(held)) if self._reuse_below else b""

    def progress(self, ended: bool) -> float:
        """The share of all sendings that is done with the next one; 0 as long as samples may come."""
        if not ended:
            return 0.0
        done, left = self._batches.done + 1, max(0, self._batches.left - 1)
        return done / (done + left)

    def _refuse(self, batch: StoredBatch) -> None:
        rows = len(batch.body.ids)
        log.warning("%d samples skipped: their activations are not finite", rows)
        taken = Consumed()
        if not batch.passes:
            taken.counts.update({"samples_read": rows, "samples_skipped": rows, "skipped_activations": rows})
        drop = partial(self._batches.drop, batch=batch.id)
        self._patience.write(partial(self._context.outbox.append_all, [], taken, drop))
