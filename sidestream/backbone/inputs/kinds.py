"""What goes through a backbone: one input of a sample, opaque to everything between its source and the model.

Only two places look into it: the source that made it, and the preprocessor of the backbone that reads it.
The others take its content (what tells it from others), its size (what it is computed beside), and how it is
kept on the device's disk. Opens no file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sidestream.backbone.inputs.text import Text


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image as it was found. Its pixels stay in its file, which is held against the digest when read."""

    path: str
    """Absolute; of an image that is in no file, what it is called."""
    digest: bytes
    """16 bytes, of the file's."""
    data: bytes = field(default=b"", repr=False, compare=False)
    """The file's bytes, where they are in no file."""


Input: TypeAlias = Text | ImageFile


def digest_of(data: bytes) -> bytes:
    """What an image file is told by."""
    return hashlib.blake2b(data, digest_size=16, person=b"image").digest()


def content_of(one: Input) -> bytes:
    """What tells an input from every other one."""
    if isinstance(one, ImageFile):
        return one.digest
    return (one if isinstance(one, str) else "\0".join(one)).encode(errors="replace")


def size_of(one: Input) -> int:
    """What inputs are sorted by, so that those that take similarly long are computed together."""
    if isinstance(one, ImageFile):
        return 1  # a model scales all to the same
    return len(one) if isinstance(one, str) else sum(map(len, one))


def is_blank(one: Input) -> bool:
    """Whether there is nothing in it."""
    return not isinstance(one, ImageFile) and not text_of(one).strip()


def text_of(one: Input) -> str:
    """Its text, or the first one of a pair; an image has none."""
    if isinstance(one, ImageFile):
        return ""
    return one if isinstance(one, str) else one[0]


def pair_of(one: Input) -> str | None:
    """The second text of a pair; None where there is none."""
    return one[1] if isinstance(one, tuple) else None


def texts_of(inputs: Sequence[Input]) -> list[Text]:
    """Inputs that are texts and pairs.

    Raises:
        TypeError: one is none.
    """
    found = [one for one in inputs if not isinstance(one, ImageFile)]
    if len(found) != len(inputs):
        raise TypeError("an image is no text")
    return found


def shown(one: Input) -> str:
    """It, for people, in one line."""
    if isinstance(one, ImageFile):
        return one.path.encode(errors="replace").decode()
    return " | ".join(" ".join(part.split()) for part in ([one] if isinstance(one, str) else one))


def about(one: Input) -> dict[str, str]:
    """It, for programs."""
    if isinstance(one, ImageFile):
        return {"image": shown(one)}
    return {"text": one} if isinstance(one, str) else {"text": one[0], "text_pair": one[1]}


def to_kept(one: Input) -> str:
    """It as the device keeps it on its disk: JSON. Of an image, where it is and not what is in it."""
    if isinstance(one, ImageFile):
        return json.dumps({"image": one.path, "digest": one.digest.hex()})
    return json.dumps(one, ensure_ascii=False)


def from_kept(kept: str) -> Input:
    """What :func:`to_kept` made."""
    found = json.loads(kept)
    if isinstance(found, dict):
        return ImageFile(str(found["image"]), bytes.fromhex(found["digest"]))
    return found if isinstance(found, str) else (str(found[0]), str(found[1]))


def seeds_of(inputs: Sequence[Input]) -> npt.NDArray[np.int64]:
    """[K]: a hash of each input, the same on every machine and in every run."""
    digests = [hashlib.blake2b(content_of(one), digest_size=8).digest() for one in inputs]
    return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)
