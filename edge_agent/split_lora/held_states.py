"""What the trainer has of batches' states, kept so that only their change is sent the next time.

Kept as it was sent, a whole tensor and the changes after it: so a device knows to the bit what is decoded
there, in little more than the bytes of one upload. Bounded; a batch that finds no room is sent whole. How far
states have moved since is told from a thousand bytes, which are kept of all.

Legend: T vectors of a batch, d hidden size.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from edge_agent.store.outbox import Outbox
from sidestream.contract.tensors import BLOCK, Codec, Floats, Tensor, decode, encode

_CLIP: Final = 1.5
"""Root mean squares. Two bits then stand for -1.5, -.5, .5 and 1.5 of them, about the best four of equal
distance for normal values (Max 1960), and the error is .34 of the norm. With nothing clipped it is .51."""
_BUCKETS: Final = 256
_SEED: Final = 20250602


class HeldStates:
    """A table in the outbox's file. Belongs to one thread.

    Args:
        outbox: Has the file.
        max_bytes: Room for all of them.
    """

    def __init__(self, outbox: Outbox, max_bytes: int) -> None:
        self._outbox = outbox
        self._max_bytes = max_bytes

    def of(self, batch: int) -> Sequence[Tensor]:
        """What a batch was sent as, the whole first; empty if that is not kept."""
        query = "SELECT tensor FROM held_states WHERE batch = ? ORDER BY part"
        with self._outbox.reading() as db:
            rows = db.execute(query, (batch,)).fetchall()
        return [msgspec.msgpack.decode(packed, type=Tensor) for (packed,) in rows]

    def put(self, db: sqlite3.Connection, batch: int, tensor: Tensor, part: int) -> None:
        """Keep what was sent, within that transaction.

        Args:
            db: The transaction's.
            batch: Of which batch.
            tensor: The states, or their change.
            part: 0 for the whole, which takes the place of all that was kept; else the number of the change.
        """
        packed = msgspec.msgpack.encode(tensor)
        if not part:
            self.forget(db, batch)
        (taken,) = db.execute("SELECT coalesce(sum(length(tensor)), 0) FROM held_states").fetchone()
        if taken + len(packed) > self._max_bytes:
            self.forget(db, batch)
            return
        db.execute("INSERT INTO held_states VALUES (?, ?, ?)", (batch, part, packed))

    def forget(self, db: sqlite3.Connection, batch: int) -> None:
        """Nothing is added to what the trainer has of a batch any more, within a transaction."""
        db.execute("DELETE FROM held_states WHERE batch = ?", (batch,))


def added_up(parts: Sequence[Tensor]) -> Floats:
    """[T, d]: what the trainer makes of a whole and its changes, to the bit."""
    whole, *changes = parts
    states: Floats = decode(whole)[0]
    for one in changes:
        np.add(states, decode(one), out=states)
    return states


def written_change(change: Floats, codec: Codec) -> Tensor:
    """A change [T, d] as it travels: what is lost of it is part of the next one.

    Raises:
        ValueError: a value is not finite.
    """
    return encode(_clipped(change) if codec is Codec.INT2 else change, codec)


def _clipped(change: Floats) -> Floats:
    """Each block's values within :data:`_CLIP` of its root mean square."""
    blocks = np.zeros((-(-change.size // BLOCK), BLOCK), np.float32)
    blocks.reshape(-1)[: change.size] = change.reshape(-1)
    most = _CLIP * np.sqrt(np.square(blocks, dtype=np.float64).mean(axis=1, keepdims=True))
    kept: Floats = np.clip(blocks, -most, most).astype(np.float32)
    return kept.reshape(-1)[: change.size].reshape(change.shape)


# --- how far states have moved ---------------------------------------------------------------------------


def sketch_of(states: Floats) -> bytes:
    """[T, d] -> f32[256] as bytes; the same lots for the same shape.

    A count sketch (Charikar et al. 2002): every value goes, with a sign drawn by lot, into one of a few
    buckets; the norm of a difference of sketches estimates that of the difference, within some 6 per cent.
    """
    flat = states.reshape(-1).astype(np.float32)
    lots = np.random.default_rng([_SEED, len(flat)])
    signs = lots.integers(0, 2, len(flat), dtype=np.int8) * 2 - 1
    places = lots.integers(0, _BUCKETS, len(flat), dtype=np.uint16)
    return np.bincount(places, weights=flat * signs, minlength=_BUCKETS).astype("<f4").tobytes()


def moved_share(before: bytes, now: bytes) -> float:
    """The norm of the change as a share of what was; infinite where nothing is kept of it."""
    old, new = np.frombuffer(before, "<f4"), np.frombuffer(now, "<f4")
    if old.shape != new.shape or not (norm := float(np.linalg.norm(old))):
        return float("inf")
    return float(np.linalg.norm(new - old)) / norm
