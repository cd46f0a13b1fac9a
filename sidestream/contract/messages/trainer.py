"""What the trainer says."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from sidestream.contract.errors import DecodeError
from sidestream.contract.messages.fields import Count, ShortText, check_stream
from sidestream.contract.tensors import Codec
from sidestream.contract.wire import Message, prepared

HIGHEST_FENCE: Final = 2**60
"""A higher one is no trainer's: going above it, and above that once more, would leave no fence to have."""


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
class CodebooksChunk(Message, frozen=True, kw_only=True):
    """One part of the codebooks of a tier, for devices that lack them: a deflated file. Retained.

    It is not signed: the plan is, and names the content by its digest.
    """

    id: ShortText
    """As the plan names them."""
    index: Annotated[int, msgspec.Meta(ge=0, lt=2**12)]
    """Its place, from 0."""
    chunks: Annotated[int, msgspec.Meta(ge=1, le=2**12)]
    """How many there are."""
    data: bytes
    """Its bytes."""

    def __post_init__(self) -> None:
        if self.index >= self.chunks:
            raise DecodeError(f"part {self.index} of {self.chunks}")


@prepared
class Assignment(Message, frozen=True, kw_only=True):
    """How one device makes its batches from the next one on, where the plan lets that be assigned. Retained.

    A device takes only what lies within :class:`~sidestream.contract.sampling.Assignable` of its tier.
    """

    run: str
    """The trainer's journal id."""
    version: Count
    """The journal's record of the choice, counted as weights versions are; 0 for the tier's own way."""
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=256)]
    """Samples a message."""
    max_tokens: Annotated[int, msgspec.Meta(ge=4, le=4096)]
    """Longer samples are cut."""
    sampling: ShortText
    """Token-sampling policy."""
    codec: Codec
    """How activations are quantised."""
    fence: Count = 0
    """Of the trainer that says so. A device that has had one of a higher fence, or of the same fence and a
    higher version, ignores it."""
    key_id: ShortText = ""
    """Of the key that signed it (:mod:`sidestream.contract.signing`); empty where nothing is signed."""
    signature: bytes = b""
    """Over all that is before it, for one job, tier and device."""

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
