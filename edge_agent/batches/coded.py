"""The activations of a sample that waits for its label: as they will travel, and what they answer meanwhile.

Legend: B taps, V vectors of all samples, N vectors of one, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from sidestream.backbone.sampled import Sampled
from sidestream.contract.plan import TierPlan
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats, Tensor, decode, join, joinable
from sidestream.contract.wire import prepared


@prepared
class KeptActivations(msgspec.Struct, frozen=True, kw_only=True):
    """Of one sample."""

    sampling: str
    """The policy that chose the vectors."""
    activations: Tensor
    """[B, N, d], quantised: it travels as it stands here."""
    words: bytes = b""
    """u16[N], where every word has a vector: which word it is."""

    @property
    def joins(self) -> bool:
        """Whether it can be in one message with others: no block of values would hold those of two."""
        return joinable(self.activations.codec, self.activations.shape)

    @property
    def length(self) -> int:
        """N."""
        return self.activations.shape[1]


def made_by(tier: TierPlan, task: Task) -> str:
    """What activations hang on: with another of these they are of no use."""
    words = " words" if task is Task.TOKEN_CLASSIFICATION else ""
    privacy = f" {tier.privacy}" if tier.privacy else ""
    return f"{tier.fingerprint} {','.join(map(str, tier.taps))}{words}{privacy}"


def write(sampled: Sampled, row: int, sampling: str, quantised: Callable[[Floats], Tensor]) -> bytes:
    """One row of a batch, quantised."""
    one = sampled.select([row])
    words = b"" if one.words is None else one.words.astype("<u2").tobytes()
    return msgspec.msgpack.encode(
        KeptActivations(sampling=sampling, activations=quantised(one.vectors), words=words)
    )


def read(data: bytes) -> KeptActivations:
    """The inverse of :func:`write`."""
    return msgspec.msgpack.decode(data, type=KeptActivations)


def joined(kept: Sequence[KeptActivations]) -> Tensor:
    """Of samples of one policy and codec, for a message: [B, V, d]."""
    return join([one.activations for one in kept])


def sampled_of(kept: Sequence[KeptActivations]) -> Sampled:
    """What the side-network takes."""
    words = np.frombuffer(b"".join(one.words for one in kept), "<u2").astype(np.int64)
    return Sampled(
        vectors=np.concatenate([decode(one.activations) for one in kept], axis=1),
        lengths=np.array([one.length for one in kept], np.int64),
        words=words if kept[0].words else None,
    )
