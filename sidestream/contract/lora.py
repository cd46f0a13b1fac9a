"""LoRA as both ends must agree on it: which linear maps of a frozen model get an adapter, and how large.

After LoRA (arXiv 2106.09685): beside a frozen map W [out, in] two small ones are trained, A [rank, in] and
B [out, rank], and it gives ``W x + (alpha / rank)·B A x``; B starts at zero. A tensor's name is the map's
path within the backbone and ``.lora_A`` or ``.lora_B``, as ``encoder.layer.0.attention.self.query.lora_A``.
The output head's are ``head.weight`` and ``head.bias``.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

from sidestream.contract.errors import DecodeError
from sidestream.contract.wire import Message, prepared

MAX_RANK: Final = 256
MAX_TARGETS: Final = 32
_TARGET: Final = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@prepared
class LoraSpec(Message, frozen=True, kw_only=True):
    """The adapters of a job. There is no dropout: a forward pass and its repetition have to agree."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)] = 8
    """r: the inner width of an adapter."""
    alpha: Annotated[float, msgspec.Meta(gt=0, le=4096)] = 16.0
    """What an adapter adds is scaled by this over the rank."""
    targets: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_TARGETS)] = ()
    """Names of the linear maps within a layer, such as ``query``, or the ends of their paths; empty: those
    that peft's table has for the architecture."""

    def __post_init__(self) -> None:
        if any(len(target) > 128 or not _TARGET.fullmatch(target) for target in self.targets):
            raise DecodeError(
                "targets: each is the name of a linear map, such as 'query' or 'attention.dense'"
            )
        if len(set(self.targets)) < len(self.targets):
            raise DecodeError("targets: one is named twice")
