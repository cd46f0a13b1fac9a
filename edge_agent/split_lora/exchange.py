"""A device's part in split LoRA: states up, gradients down, and what they mean for the adapters up again.

One thread forwards and goes back, so that both take turns on the device's processor. A batch is in the outbox
and on its way in one transaction, and what its answer means is in the outbox and the batch off its way in
another: killed anywhere, it is answered once.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from edge_agent.batches.patience import Patience
from edge_agent.context import AgentContext
from edge_agent.split_lora.adapters import DeviceAdapters
from edge_agent.split_lora.departures import Departures
from edge_agent.split_lora.intake import BatchIntake
from edge_agent.split_lora.stored_batches import Flight, StoredBatch, StoredBatches
from edge_agent.split_lora.writing import Pack, Writer
from edge_agent.store.outbox import Consumed
from sidestream.contract.errors import DecodeError, WireError
from sidestream.contract.messages import NO_BASE, GradientReply
from sidestream.contract.tensors import Floats, decode
from sidestream.split_model.loading import Pass

_WAIT_S: Final = 0.2
_SILENCE_S: Final = 300.0
_TOLD: Final = 5
log = logging.getLogger(__name__)


class Exchange:
    """See the module. :meth:`run` belongs to one thread.

    Args:
        context: The agent's.
        window: Batches that may wait for an answer.
        intake: Makes batches of samples.
        batches: Has them.
        departures: Sends them.
        writer: Writes messages.
        adapters: The device's half, and what becomes of a gradient.
        replies: The trainer's answers, as they come.
        pad: The token where a row has ended.
        patience: Writes to the outbox.
        on_batch: Called after each message.
    """

    def __init__(
        self,
        context: AgentContext,
        window: int,
        intake: BatchIntake,
        batches: StoredBatches,
        departures: Departures,
        writer: Writer,
        adapters: DeviceAdapters,
        *,
        replies: queue.SimpleQueue[GradientReply],
        pad: int,
        patience: Patience,
        on_batch: Callable[[], None],
    ) -> None:
        self._context = context
        self._window = window
        self._intake = intake
        self._batches = batches
        self._departures = departures
        self._writer = writer
        self._adapters = adapters
        self._pad = pad
        self._patience = patience
        self._on_batch = on_batch
        self._replies = replies
        self._passes: dict[bytes, Pass] = {}
        self._told = 0
        self._heard_s = context.clock()

    def run(self) -> None:
        """Take part until everything is sent, answered and learnt.

        Raises:
            DataError: the source cannot be read.
            BackboneError: the backbone does not suit the samples.
            StateError: the outbox cannot be written.
        """
        self._ask_again()
        try:
            while not self._patience.stopped():
                if self._step():
                    self._patience.between()
                elif self._is_done():
                    return
                else:  # for an answer, for adapters, or for samples
                    self._patience.wait(_WAIT_S)
        finally:
            self._intake.give_back()

    def _step(self) -> bool:
        """Do what can be done now; return whether there was anything."""
        busy = False if self._intake.ended else self._intake.read()
        if not self._adapters.ready():
            return busy
        for _ in range(self._replies.qsize()):
            self._on_reply(self._replies.get())
            busy = True
        return self._send_next() or busy or self._ask_after_silence()

    def _ask_again(self) -> None:
        """Send once more what waits for an answer that the trainer may have given another life.

        An outbox that was set back goes on with a new stream. What it waits for was perhaps receipted in the
        one before, and answered, and that was dealt with: nobody says so but the trainer, where it is asked.
        Where the window has become smaller, the trainer takes nothing for a slot outside it.
        """
        stream = self._context.outbox.stream
        for flight in self._batches.flights():
            if flight.stream != stream or flight.slot >= self._window:
                self._turn_back(flight)

    def _turn_back(self, flight: Flight) -> None:
        back = partial(self._batches.turn_back, flight=flight)
        self._patience.write(partial(self._context.outbox.append_all, [], Consumed(), back))

    def _ask_after_silence(self) -> bool:
        """Send once more what the trainer has had for long without a word; return whether there was any."""
        now = self._context.clock()
        if now - self._heard_s <= _SILENCE_S or self._context.outbox.size()[0]:
            return False
        self._heard_s, flights = now, self._batches.flights()
        for flight in flights:
            self._turn_back(flight)
        return bool(flights)

    def _is_done(self) -> bool:
        if not self._intake.ended or self._batches.left or self._batches.flights():
            return False
        return self._adapters.finish()

    # --- up ------------------------------------------------------------------------------------------

    def _send_next(self) -> bool:
        """Forward one batch and put it into the outbox, if one may be sent now."""
        flights = self._batches.flights()
        if len(flights) >= self._window or not self._context.outbox.has_room():
            return False
        if not self._adapters.may_send(waiting=len(flights)):
            return False
        batch = self._batches.next()
        if batch is None:
            return False
        used = {one.slot for one in flights}
        passed, seconds = self._forward(batch)
        ticket = self._departures.depart(
            batch,
            passed.states,
            seconds,
            slot=next(slot for slot in range(self._window) if slot not in used),
            adapter=self._adapters.version,
            number=self._adapters.round,
            ended=self._intake.ended,
            answered=True,
        )
        if ticket:
            self._passes[ticket] = passed
            self._heard_s = self._context.clock()
        return True

    def _forward(self, batch: StoredBatch) -> tuple[Pass, float]:
        started, began = self._context.clock(), self._context.trace.now()
        passed = self._adapters.lower.forward(batch.body.tokens(self._pad))
        seconds = self._context.clock() - started
        self._context.trace.add("forward", "compute", began, samples=len(batch.body.ids))
        self._context.metrics.batch_forward_seconds.observe(seconds)
        return passed, seconds

    # --- down ----------------------------------------------------------------------------------------

    def _on_reply(self, reply: GradientReply) -> None:
        self._heard_s = self._context.clock()
        if reply.applied:  # with what was refused no version comes
            self._adapters.applied(reply.ticket, 0 if reply.refused else reply.applied)
            return
        flight = self._batches.flight(reply.ticket)
        if flight is None:
            self._context.outbox.count("replies_stale", 1)
            return
        if reply.gradient is None:
            self._tell(f"a batch was not answered with a gradient: {reply.refused or 'no reason was given'}")
            if reply.refused == NO_BASE:
                self._send_whole(flight)
            else:
                self._settle(flight)
            return
        try:
            gradients, samples = self._backward(flight, reply)
        except WireError as exc:
            self._tell(f"an answer is of no use: {exc}")
            self._settle(flight)
            return
        progress = self._departures.progress(self._intake.ended)
        self._settle(flight, *self._adapters.take(flight, gradients, samples, progress))

    def _send_whole(self, flight: Flight) -> None:
        """The trainer has nothing that could stand for a batch: it is sent again, to stand for later ones."""

        def also(db: sqlite3.Connection) -> None:
            self._batches.turn_back(db, flight)
            self._batches.stands_for_none(db, flight.batch)

        self._passes.pop(flight.ticket, None)
        self._patience.write(partial(self._context.outbox.append_all, [], Consumed(), also))

    def _backward(self, flight: Flight, reply: GradientReply) -> tuple[dict[str, Floats], int]:
        """What an answer means for the adapters, and of how many rows it is.

        Raises:
            DecodeError: it does not fit its batch.
        """
        batch = self._batches.get(flight.batch)
        passed = self._passes.pop(flight.ticket, None)
        if passed is None:  # of a life before this one
            passed, _ = self._forward(batch)
        began, rows = self._context.trace.now(), self._rows(batch, reply)
        assert reply.gradient is not None
        found = passed.backward(decode(reply.gradient), rows)
        if not all(np.isfinite(one).all() for one in found.values()):
            raise DecodeError("what follows from it is not finite")
        self._context.trace.add("backward", "compute", began, samples=len(batch.body.ids))
        self._context.outbox.count("backward_passes", 1)
        return found, len(batch.body.ids) if rows is None else len(rows)

    def _rows(self, batch: StoredBatch, reply: GradientReply) -> list[int] | None:
        """Which rows the answer is for, where the trainer had had some of them before; None for all."""
        if not reply.keys:
            return None
        sent = batch._replace(passes=batch.passes - 1)
        places = {key: row for row, key in enumerate(batch.body.names)}  # of what an earlier batch stood for
        places |= {key: row for row, key in enumerate(self._writer.keys(sent))}
        return [places[key] for key in reply.sample_keys if key in places]

    def _settle(self, flight: Flight, *messages: Pack) -> None:
        """The batch does not wait any more; with what its answer means, in one transaction."""
        self._passes.pop(flight.ticket, None)
        arrive = partial(self._batches.arrive, ticket=flight.ticket)
        packed = [(one, 0) for one in messages]
        if self._patience.write(partial(self._context.outbox.append_all, packed, Consumed(), arrive)):
            self._on_batch()

    def _tell(self, what: str) -> None:
        self._told += 1
        if self._told <= _TOLD:
            log.warning("%s%s", what, "; further ones are not told" if self._told == _TOLD else "")
