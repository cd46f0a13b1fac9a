"""Ladders: ways to send, the richest first, from which a device with a byte budget chooses."""

from __future__ import annotations

from typing import Final

from sidestream.contract.errors import ConfigError, DecodeError
from sidestream.contract.messages import ShortText
from sidestream.contract.sampling import parse_sampling
from sidestream.contract.tensors import Codec
from sidestream.contract.wire import Message, prepared

MAX_RUNGS: Final = 64


@prepared
class Rung(Message, frozen=True, kw_only=True):
    """One step of a ladder: a way to send, by which a device with a byte budget may answer to it."""

    sampling: ShortText
    """Token-sampling policy."""
    codec: Codec
    """How activations are quantised."""

    def __post_init__(self) -> None:
        try:
            parse_sampling(self.sampling)
        except ConfigError as exc:
            raise DecodeError(str(exc)) from exc


DEFAULT_LADDER: Final = (
    Rung(sampling="all", codec=Codec.INT8),
    Rung(sampling="all", codec=Codec.INT4),
    Rung(sampling="all", codec=Codec.INT2),
    Rung(sampling="segments:8", codec=Codec.INT4),
    Rung(sampling="segments:4", codec=Codec.INT4),
    Rung(sampling="segments:4", codec=Codec.INT2),
    Rung(sampling="segments:2", codec=Codec.INT2),
    Rung(sampling="mean", codec=Codec.INT2),
)
"""What a device with a byte budget chooses from where its tier has no ladder."""

CODED_LADDER: Final = (
    Rung(sampling="all", codec=Codec.INT8),
    Rung(sampling="all", codec=Codec.INT4),
    Rung(sampling="all", codec=Codec.PQ1),
    Rung(sampling="segments:12", codec=Codec.PQ1),
    Rung(sampling="segments:4", codec=Codec.PQ1),
    Rung(sampling="segments:2", codec=Codec.PQ1),
    Rung(sampling="mean", codec=Codec.PQ1),
)
"""The same where the tier has codebooks."""
TOKEN_LADDER: Final = (
    Rung(sampling="all", codec=Codec.INT8),
    Rung(sampling="all", codec=Codec.INT4),
    Rung(sampling="random:0.5", codec=Codec.INT4),
    Rung(sampling="random:0.25", codec=Codec.INT4),
    Rung(sampling="random:0.125", codec=Codec.INT4),
    Rung(sampling="random:0.0625", codec=Codec.INT4),
)
"""The same in a language-model job. Not by the hardest tokens: learnt alone, they lean to surprises."""
