"""Token-sampling policies: which positions of a tapped layer travel. And ladders of them.

A policy is written ``kind`` or ``kind:count``. This module knows names and counts; the device applies them
(:mod:`sidestream.backbone.token_sampler`). The side-network takes any of them, row by row.

================ ===================================================================================
``pivot``        the one token that enters the loss: the first for an encoder, the last for a decoder
``mean``         one vector: the mean over the sample's tokens
``segments:n``   up to n vectors: means over n contiguous, equally long parts of the sample
``random:n``     up to n tokens, drawn by a hash of the sample's text: computed again, the same ones
``important:n``  up to n tokens, those that lie furthest (L2) from the mean of the sample's tokens at
                 the last tapped layer
``all``          every token, up to the tier's ``max_tokens``
``random:s``     a share s of the tokens, 0 to 1 with a point: ``random:0.5``
``hardest:s``    a language model's: the share s of tokens that its own forward pass predicts worst; what is
                 learnt from these alone leans to surprises, and does worse than a random share
================ ===================================================================================

A policy picks the same positions at every tap, keeps them in the order of the text, and takes all tokens of a
sample that has no more than n. A ladder is a list of ways to send, policy and codec, the richest first, from
which a device with a byte budget chooses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from sidestream.contract.errors import ConfigError, DecodeError
from sidestream.contract.messages import Assignment, ShortText
from sidestream.contract.tensors import Codec
from sidestream.contract.wire import Message, prepared

COUNTED: Final = ("segments", "random", "important")
SHARED: Final = ("random", "hardest")
TOKEN_KINDS: Final = ("all", "random", "hardest")
"""Those that a language model's tokens can be sampled by."""
KINDS: Final = ("pivot", "mean", "all", *COUNTED, "hardest")
MAX_COUNT: Final = 64


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A parsed policy."""

    kind: str
    """One of :data:`KINDS`."""
    count: int = 1
    """The n of a kind in :data:`COUNTED`; 1 otherwise."""
    share: float = 0.0
    """The s of a kind in :data:`SHARED`; 0 where there is a count."""

    def counts(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Vectors that samples with so many tokens yield, one at least."""
        if self.share:
            share: npt.NDArray[np.int64] = np.ceil(lengths * self.share - 1e-9).astype(np.int64)
            return share.clip(1)
        return lengths if self.kind == "all" else np.minimum(lengths, self.count)

    def most_tokens(self, max_tokens: int) -> int:
        """The most vectors that one sample yields when it is cut to ``max_tokens`` tokens.

        Of a sample with exactly ``max_tokens`` tokens, it is the number of vectors.
        """
        return int(self.counts(np.array([max_tokens]))[0])


EVERY_TOKEN: Final = Sampling(kind="all")


def parse_sampling(text: str, field: str = "sampling") -> Sampling:
    """Read a policy.

    Raises:
        ConfigError: naming ``field``, if it is none.
    """
    kind, colon, count = text.partition(":")
    if kind in SHARED and "." in count:
        return Sampling(kind=kind, share=_share(text, count, field))
    if kind not in KINDS or kind == "hardest" or (colon != "") != (kind in COUNTED):
        known = "pivot, mean, segments:4, random:4, random:0.5, important:4 or all"
        raise ConfigError(field, f"{text[:80]!r} is no policy; write {known}")
    if not colon:
        return Sampling(kind=kind)
    if not (count.isascii() and count.isdigit() and len(count) < 4 and 1 <= int(count) <= MAX_COUNT):
        raise ConfigError(field, f"{text[:80]!r}: the number after {kind!r} is 1 to {MAX_COUNT}")
    return Sampling(kind=kind, count=int(count))


def _share(text: str, number: str, field: str) -> float:
    share = float(number) if re.fullmatch(r"[01]?\.[0-9]{1,6}", number) else 0.0
    if not 0 < share <= 1:
        raise ConfigError(field, f"{text[:80]!r}: the share is over 0 and at most 1, such as 0.25")
    return share


# --- ladders -----------------------------------------------------------------------------------------------


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


@prepared
class Assignable(Message, frozen=True, kw_only=True):
    """What the trainer may assign to a device of a tier; both ends hold every assignment against it."""

    batch_size_min: Annotated[int, msgspec.Meta(ge=1, le=256)]
    """Fewest samples a message."""
    batch_size_max: Annotated[int, msgspec.Meta(ge=1, le=256)]
    """Most."""
    max_tokens_min: Annotated[int, msgspec.Meta(ge=4, le=4096)]
    """The lowest limit at which longer samples are cut."""
    max_tokens_max: Annotated[int, msgspec.Meta(ge=4, le=4096)]
    """The highest."""
    rungs: Annotated[tuple[Rung, ...], msgspec.Meta(min_length=1, max_length=MAX_RUNGS + 1)]
    """Ways to send, the richest first."""

    def __post_init__(self) -> None:
        if self.batch_size_min > self.batch_size_max or self.max_tokens_min > self.max_tokens_max:
            raise DecodeError("the least that may be assigned is more than the most")

    def why_not(self, assignment: Assignment) -> str:
        """In words, why an assignment may not be taken; empty if it may."""
        size, tokens = assignment.batch_size, assignment.max_tokens
        if not self.batch_size_min <= size <= self.batch_size_max:
            return f"batch_size {size} is not within {self.batch_size_min} to {self.batch_size_max}"
        if not self.max_tokens_min <= tokens <= self.max_tokens_max:
            return f"max_tokens {tokens} is not within {self.max_tokens_min} to {self.max_tokens_max}"
        if Rung(sampling=assignment.sampling, codec=assignment.codec) not in self.rungs:
            return "its sampling and codec are none of the plan's"
        return ""


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
