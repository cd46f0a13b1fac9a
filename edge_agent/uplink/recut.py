"""A batch that became too large for the broker, cut into smaller ones. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from sidestream.contract.messages import ActivationBatch
from sidestream.contract.wire import pack


def recut(batch: ActivationBatch, most_bytes: int) -> Iterator[ActivationBatch]:
    """Cut a batch by halves until each part takes at most ``most_bytes``, or is one row and cannot be cut."""
    rows = range(len(batch.sample_ids))
    if len(rows) == 1 or len(pack(batch)) <= most_bytes:
        yield batch
        return
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        yield from recut(batch.select(half), most_bytes)
