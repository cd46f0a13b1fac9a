"""A row of the data, the sample that it becomes, and whether it is held out. Pure."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from sidestream.backbone.text import Text


class Row(NamedTuple):
    """A text, perhaps a pair, with its label, as it stood in the source."""

    text: str
    """Of a list of words: the words with a space between."""
    label: str | None
    """A name or a number; of a list: JSON. None where there is none (yet)."""
    pair: str | None = None
    """The second text of a pair."""

    @property
    def input(self) -> Text:
        """What goes through the backbone."""
        return self.text if self.pair is None else (self.text, self.pair)

    @property
    def characters(self) -> int:
        """What it is sorted by, so that rows of similar length are computed together."""
        return len(self.text) + len(self.pair or "")


class BrokenRow(NamedTuple):
    """A row that no text could be taken from. It is counted, once, and nothing of it is kept."""

    content: bytes
    """A hash of how it stood in the source."""
    why: str = ""
    """In words."""


class Sample(NamedTuple):
    """A row that can be told from every other one, now and after a restart."""

    text: str
    label: str | None
    key: bytes
    """16 bytes: a hash of text, label and occurrence. Exact duplicates of a row are samples of their own."""
    pair: str | None = None
    broken: bool = False
    """It stands for a :class:`BrokenRow`: there is nothing but the key."""

    @property
    def row(self) -> Row:
        """What stood in the source."""
        return Row(self.text, self.label, self.pair)


def is_held_out(row: Row, share: float) -> bool:
    """Whether a row belongs to the held-out share. Equal texts always fall on the same side."""
    text = row.text if row.pair is None else f"{row.text}\0{row.pair}"
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest(), "big")
    return draw < share * 2**64
