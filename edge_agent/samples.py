"""A sample, what identifies it across restarts, and whether it is held out. Pure."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import NamedTuple


class Row(NamedTuple):
    """A text with its label's name, as it stood in the source."""

    text: str
    label: str | None


class Sample(NamedTuple):
    """A row that can be told from every other one, now and after a restart."""

    text: str
    label: str | None
    key: bytes
    """16 bytes: a hash of text, label and occurrence. Exact duplicates of a row are samples of their own."""


class Identities:
    """Turns rows into samples by counting how often each content has occurred.

    The n-th occurrence of a content always gets the same key, whatever stands between and whichever file of a
    set it is in: reading everything again after a restart names every sample as before.
    """

    def __init__(self) -> None:
        self._seen: Counter[bytes] = Counter()

    def name(self, row: Row) -> Sample:
        """Give the row its key."""
        label = b"\1" + row.label.encode() if row.label is not None else b"\0"
        content = _hash(row.text.encode() + b"\0" + label)
        self._seen[content] += 1
        return Sample(row.text, row.label, _hash(content + self._seen[content].to_bytes(8, "little")))

    def forget(self) -> None:
        """Start counting anew, before the whole source is read again."""
        self._seen.clear()


def is_held_out(text: str, share: float) -> bool:
    """Whether a text belongs to the held-out share. Equal texts always fall on the same side."""
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest(), "big")
    return draw < share * 2**64


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
