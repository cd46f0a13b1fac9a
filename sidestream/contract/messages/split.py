"""What devices and trainer exchange where a model is split between them (arXiv 2506.02940).

A batch of a split job is an :class:`ActivationBatch` that has a :class:`SplitPart`. Its **ticket** names it
in all that follows, whatever stream it travels in: the gradient that answers it, and what the device makes of
that.

Legend: K rows of a batch, T vectors in all rows together, d the backbone's hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Final, TypeAlias

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt

from sidestream.contract.errors import DecodeError
from sidestream.contract.messages.fields import Count, Place, ShortText, check_stream
from sidestream.contract.tensors import Tensor
from sidestream.contract.wire import Message, prepared, unpack

TICKET_BYTES: Final = 8
DIGEST_BYTES: Final = 8
MAX_SLOTS: Final = 64
NO_BASE: Final = "the batch that stands for it is not here"
"""Why a :class:`Reuse` is refused whose device is to send the whole batch."""
MAX_CHANGES: Final = 16
"""A batch's states may be changed so often before it is sent whole: each is decoded with all before it."""
_MAX_TENSORS: Final = 4096
_TAG_BYTES: Final = 32  # a packed message tells version and kind within so many

Ticket: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=TICKET_BYTES, max_length=TICKET_BYTES)]
SlotNumber: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]
Progress: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]
AdapterTensors: TypeAlias = Annotated[
    dict[Annotated[str, msgspec.Meta(min_length=1, max_length=256)], Tensor],
    msgspec.Meta(min_length=1, max_length=_MAX_TENSORS),
]
"""By wire name (:mod:`sidestream.split_model.lora`)."""


@prepared
class SplitPart(Message, frozen=True, kw_only=True):
    """What a batch says beside its activations where the trainer answers it."""

    ticket: Ticket
    """Its name: a hash under a secret of the device's, the same whenever the same rows are sent in a pass."""
    slot: SlotNumber
    """Where the device looks for the answer; free as far as the device knows, so an older answer there is
    done with."""
    adapter: Count = 0
    """The weights version that the forward pass used."""
    pass_number: Count = 0
    """How often the device had sent these rows before."""
    progress: Progress = 0.0
    """The share of its passes that the device has done with this batch; 1 with the last one."""
    rows: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    """K as the device made it; the trainer may have left some out."""
    context: Annotated[bytes, msgspec.Meta(max_length=2 * 1024)] = b""
    """u16[K]: vectors at each row's beginning that have no target of their own, as a prompt's; empty for
    none."""
    round: Count = 0
    """In the local form: the round of averaging that the adapter is of."""


@prepared
class _Sent(Message, frozen=True, kw_only=True, tag_field="kind"):
    """What goes into an outbox beside batches of activations: in the same stream, receipted alike."""

    stream: str
    """The outbox's random id."""
    sequence: Place
    """Position in the stream."""
    floor: Place
    """The lowest sequence still in the outbox."""
    previous: ShortText = ""
    """The content digest of the message before it in the stream."""
    ticket: Ticket
    """What it is about, or its own name."""


@prepared
class AdapterGradient(_Sent, frozen=True, kw_only=True, tag="gradient"):
    """The gradient of a device's lower adapters for one answered batch, its mean over the batch's rows."""

    adapter: Count
    """The weights version that the pass used."""
    samples: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    """Rows that it is of."""
    tensors: AdapterTensors
    """The gradients."""

    def __post_init__(self) -> None:
        _check_place(self)


@prepared
class AdapterUpload(_Sent, frozen=True, kw_only=True, tag="upload"):
    """A device's own lower adapters at the end of a round (local form)."""

    round: Count
    """Of averaging."""
    samples: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    """Rows that its steps in this round were on: its weight in the average."""
    steps: Annotated[int, msgspec.Meta(ge=1, le=2**31)] = 1
    """How many steps those were."""
    tensors: AdapterTensors
    """The adapters."""

    def __post_init__(self) -> None:
        _check_place(self)


@prepared
class StateChange(Message, frozen=True, kw_only=True):
    """What is to be added to the states that the trainer has of a batch."""

    base: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    """What it must have: their :func:`states_digest`."""
    tensor: Tensor
    """[T, d]."""

    def __post_init__(self) -> None:
        if len(self.tensor.shape) != 2:
            raise DecodeError(f"a change of shape {self.tensor.shape} is not [vectors, d]")
        if self.tensor.codec.stages:
            raise DecodeError(f"a change has no codebooks, and cannot travel as {self.tensor.codec.value}")


@prepared
class Reuse(_Sent, frozen=True, kw_only=True, tag="reuse"):
    """A batch for whose activations those of an earlier pass stand, as they are or with a change."""

    of: Ticket
    """The batch whose activations, targets and lengths are meant."""
    split: SplitPart
    """As a batch has it; its ticket is the message's."""
    change: StateChange | msgspec.UnsetType = msgspec.UNSET
    """What is added to those activations; not written where they have hardly moved."""

    def __post_init__(self) -> None:
        _check_place(self)
        if self.split.ticket != self.ticket:
            raise DecodeError("a reuse and its part name two tickets")


AdapterMessage: TypeAlias = AdapterGradient | AdapterUpload | Reuse


@prepared
class GradientReply(Message, frozen=True, kw_only=True):
    """The trainer's answer to one batch. Retained in the batch's slot until another one takes its place."""

    run: str
    """The trainer's journal id."""
    ticket: Ticket
    """Of the batch."""
    version: Count = 0
    """The weights version that served it."""
    loss: float = 0.0
    """Mean loss of its rows, before anything was learnt from them."""
    keys: bytes = b""
    """u64[K]: the rows that the answer is for, if not all."""
    gradient: Tensor | None = None
    """[T, d] of the mean loss with respect to the activations as they were sent; none where there is nothing
    to answer with."""
    refused: ShortText = ""
    """Why there is none."""
    applied: Count = 0
    """The weights version from which on the device's own answer is in; then no gradient is here any more."""
    key_id: ShortText = ""
    """Of the key that signed it (:mod:`sidestream.contract.signing`); empty where nothing is signed."""
    signature: bytes = b""
    """Over all that is before it, for one job and device."""

    def __post_init__(self) -> None:
        check_stream(self.run)
        if not np.isfinite(self.loss):
            raise DecodeError("loss is not finite")
        if self.gradient is not None and len(self.gradient.shape) != 2:
            raise DecodeError(f"a gradient of shape {self.gradient.shape} is not [vectors, d]")
        if len(self.keys) % TICKET_BYTES:
            raise DecodeError("keys must be u64 each")

    @property
    def sample_keys(self) -> list[bytes]:
        """The keys one by one, 8 bytes each; none where all rows are meant."""
        return [self.keys[start : start + TICKET_BYTES] for start in range(0, len(self.keys), TICKET_BYTES)]


def ticket_of(keys: Sequence[bytes], pass_number: int) -> bytes:
    """The name of a batch in one pass, from what its rows are known by."""
    name = hashlib.blake2b(b"".join(keys), digest_size=TICKET_BYTES, person=b"ticket")
    name.update(pass_number.to_bytes(8, "little"))
    return name.digest()


def states_digest(parts: Iterable[Tensor], before: bytes = b"") -> bytes:
    """What states are known by on either end: 8 bytes over what they were sent as.

    Args:
        parts: A whole batch's tensor and the changes that followed it, or only what followed
        before: those with this digest.
    """
    digest = before
    for one in parts:
        name = hashlib.blake2b(digest, digest_size=DIGEST_BYTES, person=b"states")
        books = one.codebooks if isinstance(one.codebooks, bytes) else b""
        name.update(f"{one.codec.value} {one.shape} {books.hex()} ".encode())
        name.update(one.data + one.scales)
        digest = name.digest()
    return digest


def derived_key(ticket: bytes, purpose: str) -> bytes:
    """What a message about a batch counts once by, in whatever stream it comes: 8 bytes."""
    return hashlib.blake2b(ticket, digest_size=TICKET_BYTES, person=purpose.encode()).digest()


_KINDS: Final[dict[str, type[AdapterMessage]]] = {
    "gradient": AdapterGradient,
    "upload": AdapterUpload,
    "reuse": Reuse,
}


def is_adapter_message(payload: bytes) -> bool:
    """Whether what an outbox holds, as :func:`~sidestream.contract.wire.pack` made it, is no activations."""
    return _kind_of(payload) in _KINDS


def unpack_adapter(payload: bytes) -> AdapterMessage:
    """Decode what comes on a device's adapter topic.

    Raises:
        DecodeError: whatever the bytes are, if they are no such message.
    """
    kind = _KINDS.get(_kind_of(payload))
    if kind is None:
        raise DecodeError("not an AdapterGradient, AdapterUpload or Reuse")
    return unpack(kind, payload)


def _kind_of(payload: bytes) -> str:
    """The tag that follows the version; empty if there is none there."""
    head = msgpack.Unpacker()
    head.feed(payload[:_TAG_BYTES])
    try:
        head.read_map_header()
        head.skip()
        head.skip()
        return str(head.unpack()) if head.unpack() == "kind" else ""
    except (ValueError, msgpack.UnpackException, RecursionError):
        return ""


def context_of(split: SplitPart, rows: int) -> npt.NDArray[np.int64]:
    """[K]: vectors at each row's beginning without a target.

    Raises:
        DecodeError: they are not of so many rows.
    """
    if not split.context:
        return np.zeros(rows, np.int64)
    if len(split.context) != 2 * rows:
        raise DecodeError(f"context must be u16 for each of the {rows} rows")
    return np.frombuffer(split.context, "<u2").astype(np.int64)


def _check_place(sent: _Sent) -> None:
    check_stream(sent.stream)
    if sent.floor > sent.sequence:
        raise DecodeError(f"floor {sent.floor} lies after sequence {sent.sequence}")
