"""What a device says of itself."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from sidestream.contract.errors import DecodeError
from sidestream.contract.messages.fields import (
    MAX_LABELS,
    MAX_STREAMS,
    Count,
    ShortText,
    check_labels,
    check_stream,
)
from sidestream.contract.quality import Tally
from sidestream.contract.wire import Message, prepared

Seconds = Annotated[float, msgspec.Meta(ge=0)]


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
        for name in ("forward_seconds", "temperature_celsius", "accuracy"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise DecodeError(f"{name} is not finite")
