"""Token-sampling policies: which positions of a tapped layer travel.

A policy is written ``kind`` or ``kind:count``. This module knows names and counts; the device applies them
(:mod:`edge_agent.taps`).

=============== ====================================================================================
``pivot``       the one token that enters the loss: the first for an encoder, the last for a decoder
``mean``        one vector: the mean over the sample's tokens
``segments:n``  up to n vectors: means over n contiguous, equally long parts of the sample
``all``         every token, up to the tier's ``max_tokens``
=============== ====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from contract.errors import ConfigError

KINDS: Final = ("pivot", "mean", "segments", "all")
MAX_SEGMENTS: Final = 64


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A parsed policy."""

    kind: str
    """One of :data:`KINDS`."""
    count: int = 1
    """Parts of ``segments``; 1 otherwise."""

    def most_tokens(self, max_tokens: int) -> int:
        """The most vectors that one sample yields when it is cut to ``max_tokens`` tokens."""
        return {"segments": min(self.count, max_tokens), "all": max_tokens}.get(self.kind, 1)


def parse_sampling(text: str, field: str = "sampling") -> Sampling:
    """Read a policy.

    Raises:
        ConfigError: naming ``field``, if it is none.
    """
    kind, colon, count = text.partition(":")
    if kind not in KINDS or (colon != "") != (kind == "segments"):
        raise ConfigError(field, f"{text[:80]!r} is no policy; write pivot, mean, segments:4 or all")
    if not colon:
        return Sampling(kind=kind)
    if not (count.isascii() and count.isdigit() and len(count) < 4 and 1 <= int(count) <= MAX_SEGMENTS):
        raise ConfigError(field, f"{text[:80]!r}: the number of segments is 1 to {MAX_SEGMENTS}")
    return Sampling(kind=kind, count=int(count))
