"""What a device computed, on its way into the journal.

Legend: K rows (samples) of a batch, B taps, T vectors in all rows together, d the backbone's hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt

from sidestream.contract.errors import DecodeError
from sidestream.contract.messages.fields import MAX_ROWS, Place, ShortText, check_stream
from sidestream.contract.messages.split import (
    AdapterMessage,
    Reuse,
    SplitPart,
    context_of,
    is_adapter_message,
    unpack_adapter,
)
from sidestream.contract.tasks import PER_VECTOR, TargetForm, Targets, read_targets, select_targets
from sidestream.contract.tensors import Tensor, take
from sidestream.contract.wire import Message, pack, prepared, unpack

_HEAD_BYTES = 256  # a packed batch tells stream, sequence and floor within so many


@prepared
class ActivationBatch(Message, frozen=True, kw_only=True):
    """What a device computed from K samples, once: the tapped, sampled, quantised activations."""

    stream: str
    """The outbox's random id, 32 hex digits: with ``sequence``, the batch's identity for ever."""
    sequence: Place
    """Position in the stream, from 1, without gaps but for those below ``floor``."""
    floor: Place
    """The lowest sequence still in the outbox: all before it are receipted or were dropped there."""
    fingerprint: ShortText
    """Of the backbone's weights."""
    labels_id: ShortText
    """Of the label list that ``targets`` index (:func:`sidestream.contract.plan.labels_id`)."""
    taps: Annotated[tuple[int, ...], msgspec.Meta(min_length=1, max_length=256)]
    """Tapped layers, 1 = the first block's output, ascending."""
    sampling: ShortText
    """The token-sampling policy that made the vectors."""
    samples: bytes
    """u32[K]: the samples' ordinal numbers in the stream. They say nothing of their content."""
    lengths: bytes
    """u16[K]: vectors of each row; they add up to T."""
    targets: bytes
    """What the rows are to be answered with, written as ``target_form`` says."""
    activations: Tensor
    """[B, T, d]."""
    target_form: TargetForm = TargetForm.LABELS
    """How ``targets`` are written (:mod:`sidestream.contract.tasks`)."""
    previous: ShortText = ""
    """The :func:`content_digest` of the batch before it in the stream, whatever became of that one; empty for
    the first, and from whoever keeps no chain. So a batch stands for all of its history, and one history is
    never taken for another."""
    keys: bytes = b""
    """u64[K]: by which the trainer knows a sample that comes again, in whatever batch of whatever stream.
    They are hashes under a secret of the device's, and say nothing of the samples' content."""
    split: SplitPart | msgspec.UnsetType = msgspec.UNSET
    """Where a model is split, what the trainer needs to know to answer; not written where it is not."""

    def __post_init__(self) -> None:
        check_stream(self.stream)
        rows = len(self.samples) // 4
        if not 1 <= rows <= MAX_ROWS or len(self.samples) != 4 * rows:
            raise DecodeError(f"a batch has 1 to {MAX_ROWS} samples, u32 each")
        if len(self.lengths) != 2 * rows:
            raise DecodeError(f"lengths must be u16 for each of the {rows} samples")
        if self.floor > self.sequence:
            raise DecodeError(f"floor {self.floor} lies after sequence {self.sequence}")
        if list(self.taps) != sorted(set(self.taps)) or self.taps[0] < 1:
            raise DecodeError("taps must ascend from 1 or later")
        shape = self.activations.shape
        vectors = int(self.row_lengths.sum())
        if len(shape) != 3 or shape[:2] != (len(self.taps), vectors) or (self.row_lengths == 0).any():
            raise DecodeError(
                f"activations of shape {shape} are not [{len(self.taps)} taps, {vectors} vectors, d], "
                "or a row is empty"
            )
        if len(np.unique(self.sample_ids)) != rows:
            raise DecodeError("a sample stands twice in one batch")
        if self.keys and (len(self.keys) != 8 * rows or len(set(self.sample_keys)) != rows):
            raise DecodeError(f"keys must be u64 for each of the {rows} samples, and no two the same")
        read_targets(self.target_form, self.targets, rows=rows, vectors=vectors)
        if (part := self.part) is not None:
            if rows > part.rows:
                raise DecodeError(f"{rows} rows are more than the {part.rows} that the batch was made of")
            context_of(part, rows)

    @property
    def part(self) -> SplitPart | None:
        """What it says where a model is split; None elsewhere."""
        return None if isinstance(self.split, msgspec.UnsetType) else self.split

    @property
    def sample_ids(self) -> npt.NDArray[Any]:
        """U32[K]."""
        return np.frombuffer(self.samples, "<u4")

    @property
    def row_lengths(self) -> npt.NDArray[Any]:
        """U16[K]."""
        return np.frombuffer(self.lengths, "<u2")

    @property
    def sample_keys(self) -> list[bytes]:
        """The keys one by one, 8 bytes each; none where the device gave none."""
        return [self.keys[start : start + 8] for start in range(0, len(self.keys), 8)]

    def read_targets(self) -> Targets:
        """The targets as an array (:func:`sidestream.contract.tasks.read_targets`)."""
        lengths = self.row_lengths
        return read_targets(self.target_form, self.targets, rows=len(lengths), vectors=int(lengths.sum()))

    def select(self, rows: Sequence[int]) -> ActivationBatch:
        """The same batch with only some of its rows, in their order; their values stay as they were written.

        Where a codec's blocks run over the ends of vectors (4 or 2 bits, and a width that 64 does not
        divide), they are written anew, within the codec's error.
        """
        lengths = self.row_lengths.astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        vectors = np.concatenate([np.arange(starts[row], starts[row] + lengths[row]) for row in rows])
        per_vector = self.target_form in PER_VECTOR
        picked, count = (vectors, int(lengths.sum())) if per_vector else (np.asarray(rows), len(lengths))
        return msgspec.structs.replace(
            self,
            samples=self.sample_ids[list(rows)].tobytes(),
            lengths=self.row_lengths[list(rows)].tobytes(),
            targets=select_targets(self.targets, picked, count),
            activations=take(self.activations, vectors),
            keys=b"".join(self.sample_keys[row] for row in rows) if self.keys else b"",
            split=(
                msgspec.UNSET if self.part is None else _select_context(self.part, list(rows), len(lengths))
            ),
        )


def _select_context(split: SplitPart, rows: list[int], count: int) -> SplitPart:
    context = context_of(split, count)[rows].astype("<u2").tobytes() if split.context else b""
    return msgspec.structs.replace(split, context=context)


def with_floor(payload: bytes, floor: int) -> bytes:
    """A batch as :func:`~sidestream.contract.wire.pack` made it, with another floor; the rest as it is."""
    head = msgpack.Unpacker()
    head.feed(payload[:_HEAD_BYTES])
    head.read_map_header()
    while head.unpack() != "floor":
        head.skip()
    start = head.tell()
    head.skip()
    packed: bytes = msgpack.packb(floor)
    return payload[:start] + packed + payload[head.tell() :]


def content_digest(batch: ActivationBatch | AdapterMessage | bytes) -> str:
    """What a message of an outbox is known by beside its place: 32 hex digits, whatever ``floor`` it has.

    Both ends take it. It covers ``previous``, and so every batch before it in the stream.

    Args:
        batch: Itself, or as it was packed on this machine.
    """
    payload = batch if isinstance(batch, bytes) else pack(batch)
    return hashlib.sha256(with_floor(payload, 1)).hexdigest()[:32]


def awaited_ticket(payload: bytes) -> bytes:
    """The ticket of what an outbox holds, if its device waits for an answer to it; empty otherwise."""
    if is_adapter_message(payload):
        message = unpack_adapter(payload)
        return message.ticket if isinstance(message, Reuse) else b""
    part = unpack(ActivationBatch, payload).part
    return part.ticket if part is not None else b""
