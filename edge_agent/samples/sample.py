"""A row of the data, the sample that it becomes, and whether it is held out. Opens image files only."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from sidestream.backbone.images.decoding import check_image
from sidestream.backbone.inputs import ImageFile, Input, content_of, is_blank, pair_of, size_of, text_of
from sidestream.contract.errors import DataError


class Row(NamedTuple):
    """An input with its label, as it stood in the source."""

    input: Input
    """What goes through the backbone; of a list of words: the words with a space between."""
    label: str | None
    """A name or a number; of a list: JSON. None where there is none (yet)."""

    @property
    def text(self) -> str:
        """Its text, or the first one of a pair."""
        return text_of(self.input)

    @property
    def pair(self) -> str | None:
        """The second text of a pair."""
        return pair_of(self.input)

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to compute."""
        return is_blank(self.input)

    @property
    def size(self) -> int:
        """What it is sorted by, so that rows of similar length are computed together."""
        return size_of(self.input)


class BrokenRow(NamedTuple):
    """A row that no input could be taken from. It is counted, once, and nothing of it is kept."""

    content: bytes
    """A hash of how it stood in the source."""
    why: str = ""
    """In words."""


class Sample(NamedTuple):
    """A row that can be told from every other one, now and after a restart."""

    input: Input
    label: str | None
    key: bytes
    """16 bytes: a hash of input, label and occurrence. Exact duplicates of a row are samples of their own."""
    broken: bool = False
    """It stands for a :class:`BrokenRow`: there is nothing but the key."""

    @property
    def row(self) -> Row:
        """What stood in the source."""
        return Row(self.input, self.label)


def why_unreadable(one: Input) -> str:
    """In one line, why nothing can be computed of an input; empty where it can. An image's file is read.

    Raises:
        BackboneError: what reads images is not installed.
    """
    if isinstance(one, ImageFile):
        try:
            check_image(one)
        except DataError as exc:
            return str(exc)
    return ""


def is_held_out(row: Row, share: float) -> bool:
    """Whether a row belongs to the held-out share. Equal inputs always fall on the same side."""
    digest = hashlib.blake2b(content_of(row.input), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") < share * 2**64
