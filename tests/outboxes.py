"""What goes into an outbox, and the receipts for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_agent.store.outbox import Outbox
from edge_agent.store.streams import Slot
from sidestream.contract.messages import ActivationBatch, Receipt, to_bin
from sidestream.contract.tensors import Codec, encode
from sidestream.contract.wire import pack


def message(
    slot: Slot, *, width: int = 8, rows: int = 1, codec: Codec = Codec.F32, value: float = 1.0
) -> bytes:
    """A batch of rows of one vector each, in its place in the stream."""
    return pack(
        ActivationBatch(
            stream=slot.stream,
            sequence=slot.sequence,
            floor=slot.floor,
            fingerprint="f",
            labels_id="l",
            taps=(1,),
            sampling="mean",
            samples=to_bin(np.arange(slot.first_sample, slot.first_sample + rows), "<u4"),
            lengths=to_bin([1] * rows, "<u2"),
            targets=to_bin([0] * rows, "<u2"),
            activations=encode(np.full((1, rows, width), value, np.float32), codec),
            previous=slot.previous,
        )
    )


def receipt_for(outbox: Outbox, upto: int, **changes: Any) -> Receipt:
    """The receipt of a trainer that has just what the outbox has made, up to a sequence of its stream."""
    with outbox._file.reading() as db:
        row = db.execute(
            "SELECT digest FROM batches b JOIN streams s ON s.id = b.stream WHERE name = ? AND sequence = ?",
            (outbox.stream, upto),
        ).fetchone()
    fields = {"stream": outbox.stream, "upto": upto, "digest": row[0] if row else "", **changes}
    return Receipt(**fields)


def refuse(outbox: Outbox, sequence: int) -> bool:
    """The trainer will never take a batch that waits."""
    return outbox.refuse(outbox.stream, sequence, receipt_for(outbox, sequence).digest)
