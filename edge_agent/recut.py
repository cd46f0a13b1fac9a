"""A batch that became too large for the broker, cut into smaller ones. Pure.

Row by row it stays what it was: vectors are cut off as they are written, and each sample keeps its number in
the stream, so that none passes for another.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from contract.messages import ActivationBatch, to_bin
from contract.tasks import PER_VECTOR
from contract.tensors import cut
from contract.wire import pack


def recut(batch: ActivationBatch, most_bytes: int) -> Iterator[ActivationBatch]:
    """Cut a batch by halves until each part takes at most ``most_bytes``, or is one row and cannot be cut."""
    rows = len(batch.sample_ids)
    if rows == 1 or len(pack(batch)) <= most_bytes:
        yield batch
        return
    for first, last in ((0, rows // 2), (rows // 2, rows)):
        yield from recut(_part(batch, first, last), most_bytes)


def _part(batch: ActivationBatch, first: int, last: int) -> ActivationBatch:
    """Rows ``first`` to ``last``, that one not included."""
    lengths = batch.row_lengths.astype(np.int64)
    start, end = int(lengths[:first].sum()), int(lengths[:last].sum())
    per_vector = batch.target_form in PER_VECTOR
    width = len(batch.targets) // (int(lengths.sum()) if per_vector else len(lengths))
    targets = (start, end) if per_vector else (first, last)
    return msgspec.structs.replace(
        batch,
        samples=to_bin(batch.sample_ids[first:last], "<u4"),
        lengths=to_bin(lengths[first:last], "<u2"),
        targets=batch.targets[targets[0] * width : targets[1] * width],
        activations=cut(batch.activations, start, end),
    )
