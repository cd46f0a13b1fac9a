"""Batches that a device of a split job sends again and again, and those of them that wait for an answer.

Tables in the outbox's file, so that a batch is in the outbox, on its way and counted in one transaction, or
not at all. Knows no tensors and no network.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

import msgspec

from edge_agent.split_lora.held_states import HeldStates
from edge_agent.split_lora.prepared import StoredBody
from edge_agent.store.outbox import Consumed, Outbox

_SHUFFLES: Final = 2**31
_HELD_SHARE: Final = 0.5
"""Room for what the trainer has of batches, in the outbox's."""


class StoredBatch(NamedTuple):
    """A batch."""

    id: int
    body: StoredBody
    passes: int
    """How often it has been sent."""
    base: bytes
    """Its ticket in the pass in which states of it were last sent; empty before that."""
    sketch: bytes
    """What those were like, as the trainer has them."""


class Flight(NamedTuple):
    """A batch that waits for an answer."""

    ticket: bytes
    batch: int
    slot: int
    adapter: int
    """The weights version of its forward pass."""
    stream: str
    """That it was sent in."""


class StoredBatches:
    """The tables. Belongs to one thread.

    Args:
        outbox: Has the file.
        passes: How often each batch is sent.
    """

    def __init__(self, outbox: Outbox, passes: int) -> None:
        self._outbox = outbox
        self._passes = passes
        self.held = HeldStates(outbox, int(_HELD_SHARE * outbox.max_bytes))
        """What the trainer has of their states."""

    def add(self, db: sqlite3.Connection, body: StoredBody) -> None:
        """Keep a batch, within a transaction."""
        db.execute(
            "INSERT INTO split_batches (samples, body, shuffle) VALUES (?, ?, ?)",
            (len(body.ids), msgspec.msgpack.encode(body), random.randrange(_SHUFFLES)),
        )

    def rewrite(self, change: Callable[[StoredBody], StoredBody]) -> int:
        """Have all batches that are still to be sent be as ``change`` makes them; return how many others are.

        Such a one is sent whole the next time: what the trainer has of it is not the same.
        """
        with self._outbox.reading() as db:
            query = "SELECT id, body FROM split_batches WHERE passes < ?"
            rows = db.execute(query, (self._passes,)).fetchall()
        changed = 0
        for number, packed in rows:
            body = msgspec.msgpack.decode(packed, type=StoredBody)
            if (other := change(body)) != body:
                self._outbox.append_all([], Consumed(), partial(self._replace, number=number, body=other))
                changed += 1
        return changed

    def _replace(self, db: sqlite3.Connection, number: int, body: StoredBody) -> None:
        packed = msgspec.msgpack.encode(body)
        db.execute("UPDATE split_batches SET body = ? WHERE id = ?", (packed, number))
        self.stands_for_none(db, number)

    def next(self) -> StoredBatch | None:
        """One that has been sent least often, chosen by lot; None if all have been sent often enough."""
        with self._outbox.reading() as db:
            row = db.execute(
                "SELECT id, body, passes, base, sketch FROM split_batches WHERE passes < ? AND id NOT IN "
                "(SELECT batch FROM flights) ORDER BY passes, shuffle LIMIT 1",
                (self._passes,),
            ).fetchone()
        return None if row is None else _batch(*row)

    def get(self, batch: int) -> StoredBatch:
        """One of them."""
        query = "SELECT id, body, passes, base, sketch FROM split_batches WHERE id = ?"
        with self._outbox.reading() as db:
            return _batch(*db.execute(query, (batch,)).fetchone())

    def sent(self, db: sqlite3.Connection, batch: StoredBatch, base: bytes, sketch: bytes) -> None:
        """A batch was put into the outbox once more, within that transaction."""
        db.execute(
            "UPDATE split_batches SET passes = passes + 1, shuffle = ?, base = ?, sketch = ? WHERE id = ?",
            (random.randrange(_SHUFFLES), base, sketch, batch.id),
        )
        if self.is_last(batch):
            self.held.forget(db, batch.id)

    def is_last(self, batch: StoredBatch) -> bool:
        """Whether a batch that is to be sent is not sent again after that."""
        return batch.passes + 1 >= self._passes

    def drop(self, db: sqlite3.Connection, batch: int) -> None:
        """Nothing can be made of a batch."""
        db.execute("DELETE FROM split_batches WHERE id = ?", (batch,))
        self.held.forget(db, batch)

    @property
    def left(self) -> int:
        """Sendings that are still to come."""
        return self._sum("max(? - passes, 0)")

    @property
    def done(self) -> int:
        """Those that have been."""
        return self._sum("min(?, passes)")

    def _sum(self, what: str) -> int:
        with self._outbox.reading() as db:
            row = db.execute(f"SELECT coalesce(sum({what}), 0) FROM split_batches", (self._passes,))
            return int(row.fetchone()[0])

    # --- on their way --------------------------------------------------------------------------------

    def depart(self, db: sqlite3.Connection, flight: Flight) -> None:
        """A batch waits for an answer from now on, within a transaction."""
        db.execute("INSERT OR REPLACE INTO flights VALUES (?, ?, ?, ?, ?)", flight)

    def arrive(self, db: sqlite3.Connection, ticket: bytes) -> None:
        """It has been answered, and that is dealt with."""
        db.execute("DELETE FROM flights WHERE ticket = ?", (ticket,))

    def stands_for_none(self, db: sqlite3.Connection, batch: int) -> None:
        """What the trainer has of a batch is of no use for later passes: the next one is sent whole."""
        db.execute("UPDATE split_batches SET base = x'', sketch = x'' WHERE id = ?", (batch,))
        self.held.forget(db, batch)

    def turn_back(self, db: sqlite3.Connection, flight: Flight) -> None:
        """A batch is to be sent once more, as if it had not been, within a transaction.

        If states of it were sent, whether they have come is not known: it is sent whole.
        """
        self.arrive(db, flight.ticket)
        db.execute("UPDATE split_batches SET passes = passes - 1 WHERE id = ?", (flight.batch,))
        query = "SELECT 1 FROM split_batches WHERE id = ? AND base = ?"
        if db.execute(query, (flight.batch, flight.ticket)).fetchone():
            self.stands_for_none(db, flight.batch)

    def flight(self, ticket: bytes) -> Flight | None:
        """A batch that waits; None if it does not any more."""
        return next((one for one in self.flights() if one.ticket == ticket), None)

    def flights(self) -> Sequence[Flight]:
        """Those that wait."""
        with self._outbox.reading() as db:
            rows = db.execute(
                "SELECT ticket, batch, slot, adapter, stream FROM flights ORDER BY ticket"
            ).fetchall()
        return [Flight(*row) for row in rows]


def _batch(number: int, body: bytes, passes: int, base: bytes, sketch: bytes) -> StoredBatch:
    return StoredBatch(number, msgspec.msgpack.decode(body, type=StoredBody), passes, base, sketch)
