"""The messages between agents and trainer, other than the plan.

Each type checks what it promises when it is made, on either end. Arrays of numbers travel as ``bin``,
little-endian, and are read with the properties beside them.

Legend: K rows (samples) of a batch, B taps, T vectors in all rows together, d the backbone's hidden size.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt

from sidestream.contract.errors import DecodeError
from sidestream.contract.quality import Tally
from sidestream.contract.tasks import PER_VECTOR, TargetForm, Targets, read_targets, select_targets
from sidestream.contract.tensors import Tensor, take
from sidestream.contract.wire import Message, prepared, to_map

MAX_ROWS: Final = 1024
MAX_STREAMS: Final = 16
MAX_LABELS: Final = 1024
MAX_LABEL_CHARS: Final = 128
_STREAM = re.compile(r"[0-9a-f]{32}")
_LARGEST = 2**62
HIGHEST_FENCE: Final = 2**60
"""A higher one is no trainer's: going above it, and above that once more, would leave no fence to have."""

Count = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST)]
ShortText = Annotated[str, msgspec.Meta(max_length=512)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


def check_stream(stream: str) -> None:
    """Refuse what is no id of an outbox or a journal.

    Raises:
        DecodeError: if it is not 32 lower-case hexadecimal digits.
    """
    if not _STREAM.fullmatch(stream):
        raise DecodeError("the id of a stream or run is 32 hexadecimal digits")


def _check_finite(message: Message, *fields: str) -> None:
    for field in fields:
        value = getattr(message, field)
        if value is not None and not math.isfinite(value):
            raise DecodeError(f"{field} is not finite")


def check_labels(labels: Sequence[str]) -> None:
    """Refuse a list of label names that no job may have.

    Raises:
        DecodeError: if there are too many, one is empty or too long, or two are equal.
    """
    if len(labels) > MAX_LABELS:
        raise DecodeError(f"{len(labels)} labels; a job has at most {MAX_LABELS}")
    if any(not 1 <= len(label) <= MAX_LABEL_CHARS for label in labels):
        raise DecodeError(f"a label name has 1 to {MAX_LABEL_CHARS} characters")
    if any(label != label.strip() for label in labels):
        raise DecodeError("a label name neither begins nor ends with white space")
    if len(set(labels)) != len(labels):
        raise DecodeError("two labels have the same name")


def to_bin(values: npt.ArrayLike, dtype: str) -> bytes:
    """Integers as little-endian bytes; the inverse of ``np.frombuffer(…, dtype)``."""
    return np.asarray(values).astype(dtype).tobytes()


@prepared
class ActivationBatch(Message, frozen=True, kw_only=True):
    """What a device computed from K samples, once: the tapped, sampled, quantised activations."""

    stream: str
    """The outbox's random id, 32 hex digits: with ``sequence``, the batch's identity for ever."""
    sequence: Annotated[int, msgspec.Meta(ge=1, le=_LARGEST)]
    """Position in the stream, from 1, without gaps but for those below ``floor``."""
    floor: Annotated[int, msgspec.Meta(ge=1, le=_LARGEST)]
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
        )


def content_digest(batch: ActivationBatch) -> str:
    """What a batch is known by beside its place: 32 hex digits, the same whatever ``floor`` it was sent with.

    Both ends take it. It covers ``previous``, and so every batch before it in the stream.
    """
    packed: bytes = msgpack.packb(to_map(msgspec.structs.replace(batch, floor=1)), use_bin_type=True)
    return hashlib.sha256(packed).hexdigest()[:32]


@prepared
class Receipt(Message, frozen=True, kw_only=True):
    """The trainer's word that everything up to a sequence is safe in its journal; or why one batch is not.

    Whatever it says of a batch, it names the batch by its content as well, and the device checks that: an
    outbox that was set back or copied has other batches under the same sequences, and anybody who can publish
    could have a device's good batches thrown away by sending bad ones.
    """

    stream: str
    """Of the outbox it speaks to; an outbox ignores receipts for other streams."""
    upto: Count
    """Every batch with this sequence or a lower one is safe, if ``digest`` is the device's own."""
    refused_sequence: Count = 0
    """A batch that was refused for good; 0 for none."""
    refused_digest: ShortText = ""
    """Its :func:`content_digest`; a device whose own batch has another one ignores the refusal."""
    reason: ShortText = ""
    """Why it was refused."""
    fence: Count = 0
    """Of the trainer that says so; a device that knows of a higher one ignores it."""
    wait: bool = False
    """The trainer has no room for what this device sends, which is in quarantine: the device keeps it, and
    asks again with one batch now and then. ``reason`` says why."""
    digest: ShortText = ""
    """The :func:`content_digest` of the journaled batch ``upto``; empty if the device had given that one up.
    A device with another one there knows that its history and the journal's have parted."""
    forked_sequence: Count = 0
    """A batch that the journal will never take, since it holds another history of the stream; 0 for none."""
    forked_digest: ShortText = ""
    """Its :func:`content_digest`; a device whose own batch has another one ignores that."""
    saved: Count = 0
    """Every batch up to here is in a backup of the journal: the device need not keep it for the day when the
    journal is set back."""

    def __post_init__(self) -> None:
        check_stream(self.stream)


@prepared
class Status(Message, frozen=True, kw_only=True):
    """A device's birth, or its death: the last will, or a goodbye. Retained."""

    state: Literal["online", "offline"]
    """What it says."""
    birth: Count
    """Counts the agent's connections, so that a late will of an older one is recognised."""
    stream: str
    """The outbox's id."""
    software: ShortText = ""
    """The agent's version."""
    backbone: ShortText = ""
    """The backbone's reference, as configured."""
    fingerprint: ShortText = ""
    """Of the backbone's weights; empty until it is loaded."""
    depth: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    """Transformer layers in use; 0 until the backbone is loaded."""
    width: Annotated[int, msgspec.Meta(ge=0, le=65536)] = 0
    """Hidden size; 0 until the backbone is loaded."""
    labels: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_LABELS)] = ()
    """Label names in the device's data, where it can list them."""
    reason: ShortText = ""
    """Of an offline state: ``goodbye``, ``lost``, or what went wrong."""
    instance: ShortText = ""
    """The process's random name, by which two agents under one device's name are told apart."""
    kept_streams: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_STREAMS)] = ()
    """Earlier streams of the outbox of which it still keeps receipted batches."""

    def __post_init__(self) -> None:
        check_stream(self.stream)
        for stream in self.kept_streams:
            check_stream(stream)
        check_labels(self.labels)


@prepared
class Telemetry(Message, frozen=True, kw_only=True):
    """What a device reports of itself every few seconds. Counters run over the life of its outbox."""

    stream: str
    """The outbox's id."""
    samples_read: Count = 0
    """Samples taken from the source."""
    samples_held_out: Count = 0
    """Of those, kept for local evaluation and never uploaded."""
    samples_skipped: Count = 0
    """Of those, unusable: empty, or with a label that the job does not have."""
    samples_forwarded: Count = 0
    """Samples that went through the backbone for training; one without a label counts once that has come."""
    samples_dropped: Count = 0
    """Samples in batches that a full outbox dropped."""
    batches_dropped: Count = 0
    """Those batches."""
    batches_refused: Count = 0
    """Batches that the trainer refused."""
    batches_sent: Count = 0
    """Publishes, repeats included."""
    bytes_up: Count = 0
    """Payload bytes published, repeats included."""
    bytes_down: Count = 0
    """Payload bytes received."""
    forward_seconds: Seconds = 0.0
    """Time in the backbone's forward pass for training."""
    outbox_batches: Count = 0
    """Batches waiting for a receipt."""
    outbox_bytes: Count = 0
    """Their bytes."""
    rss_bytes: Count = 0
    """Resident memory of the agent's process."""
    peak_rss_bytes: Count = 0
    """The most it ever was."""
    temperature_celsius: float | None = None
    """Of the board, where it tells."""
    weights_version: Count = 0
    """The side-network version in use."""
    accuracy: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    """Of that version on the device's own evaluation samples."""
    evaluation_samples: Count = 0
    """How many those are."""
    finished: bool = False
    """The source has ended, and every batch is receipted."""
    outbox_max_bytes: Count = 0
    """The most that the outbox takes; 0 from an agent that does not tell."""
    messages_dropped: Count = 0
    """Messages to the device that found its mailbox full."""
    weights_refused: Count = 0
    """Plans and weights that were not adopted: not signed, altered, older than adopted ones, or unfit."""
    tally: Tally | None = None
    """What that version answered on those samples."""
    samples_unlabelled: Count = 0
    """Of the samples read, those that came without a label, were forwarded once and kept until one comes."""
    unlabelled_waiting: Count = 0
    """How many of them have none yet."""
    unlabelled_dropped: Count = 0
    """Of them, those that were dropped for want of room."""
    weights_run: ShortText = ""
    """The journal that ``weights_version`` is of."""
    streams_forked: Count = 0
    """How often the outbox has begun a new stream because its history and the journal's had parted."""
    samples_lost: Count = 0
    """Samples that a trainer had receipted, that its journal lacks since it was set back, and that the device
    no longer holds."""

    def __post_init__(self) -> None:
        check_stream(self.stream)
        _check_finite(self, "forward_seconds", "temperature_celsius", "accuracy")


@prepared
class WeightsManifest(Message, frozen=True, kw_only=True):
    """A version of the side-network for one tier: its identity, and its bytes or where they are. Retained."""

    run: str
    """The trainer's journal id: versions are comparable within one run."""
    version: Count
    """The number of journal records folded in: it only rises, and a re-fold gives the same weights."""
    state_digest: ShortText
    """sha256 of the trainer's whole side-network at that offset, as ``trainer verify`` recomputes it."""
    bundle_digest: ShortText
    """sha256 of the bundle."""
    bundle_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    """Length of the bundle."""
    chunks: Annotated[int, msgspec.Meta(ge=0, le=2**14)] = 0
    """Messages that carry the bundle under ``weights/<version>/<n>``; 0 if it is inline."""
    bundle: bytes = b""
    """The safetensors bundle where it fits."""
    samples: Count = 0
    """Distinct samples in the journal at that offset."""
    final: bool = False
    """Training has gone idle with this version."""
    key_id: ShortText = ""
    """Of the key that signed it (:mod:`sidestream.contract.signing`); empty where nothing is signed."""
    signature: bytes = b""
    """Over all that is before it, the digest of the bundle included, for one job and tier."""

    def __post_init__(self) -> None:
        check_stream(self.run)
        if len(self.bundle) != (0 if self.chunks else self.bundle_bytes):
            raise DecodeError(
                f"{len(self.bundle)} bytes inline of a bundle of {self.bundle_bytes} in {self.chunks} chunks"
            )


@prepared
class WeightsChunk(Message, frozen=True, kw_only=True):
    """One part of a bundle. Retained until the next version."""

    run: str
    """As in the manifest."""
    version: Count
    """As in the manifest."""
    index: Annotated[int, msgspec.Meta(ge=0, le=2**14)]
    """Its place, from 0."""
    data: bytes
    """Its bytes."""

    def __post_init__(self) -> None:
        check_stream(self.run)


@prepared
class Flow(Message, frozen=True, kw_only=True):
    """How fast a tier may send. Retained; overrides the plan's."""

    window: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    """Batches a device may have published without a receipt."""
    pause: bool = False
    """Send nothing for now; keep batches in the outbox."""


@prepared
class TrainerStatus(Message, frozen=True, kw_only=True):
    """The trainer's birth, progress or death. Retained, also its last will."""

    state: Literal["online", "offline"]
    """What it says."""
    run: str
    """The journal's id."""
    epoch: Count
    """Counts the trainer's starts on this journal."""
    version: Count = 0
    """Journal records folded."""
    samples: Count = 0
    """Distinct samples journaled."""
    final: bool = False
    """Idle: every pass over the journal is done."""
    fence: Count = 0
    """Of two trainers of one job the one with the higher fence rules; 0 from one that knows no fences."""
    instance: ShortText = ""
    """The process's random name."""
    key_id: ShortText = ""
    """Of the key that signed it (:mod:`sidestream.contract.signing`); empty where nothing is signed."""
    signature: bytes = b""
    """Over all that is before it, for one job: a trainer that signs gives way to no other status."""

    def __post_init__(self) -> None:
        check_stream(self.run)


@prepared
class TrainerClaim(Message, frozen=True, kw_only=True):
    """A trainer asks whether there is another one of its job; that one answers with its status."""

    instance: ShortText
    """The process's random name."""
    fence: Count
    """Its fence, which rises if need be."""
    take_over: bool = False
    """Whether it will depose the other."""


@prepared
class Rejection(Message, frozen=True, kw_only=True):
    """Why a message was refused, without its content."""

    kind: ShortText
    """``activations``, ``status`` or ``telemetry``."""
    reason: ShortText
    """For an operator to read."""
    size_bytes: Count
    """Of the refused payload."""
    stream: ShortText = ""
    """Where it was readable."""
    sequence: Count = 0
    """Where it was readable."""
