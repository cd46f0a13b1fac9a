"""What a device says of itself."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

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


def _counter(what: str, metric: str = "") -> msgspec.Meta:
    return msgspec.Meta(description=what, extra={"metric": metric})


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
    memory_bytes: Count = 0
    """Memory that the machine has free; 0 from an agent that does not tell."""
    certificate_expires_unix_s: Seconds = 0.0
    """When the certificate ends by which it connects; 0 without one."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.certificate_expires_unix_s):
            raise DecodeError("certificate_expires_unix_s is not finite")
        check_stream(self.stream)
        for stream in self.kept_streams:
            check_stream(stream)
        check_labels(self.labels)


@prepared
class Telemetry(Message, frozen=True, kw_only=True, omit_defaults=True):
    """What a device reports of itself; what has its default does not travel.

    Counters run over the life of its outbox.

    Every sample read is forwarded, held out, skipped, broken, dropped for want of a label, or still waits for
    one; the counters of what was skipped for which reason add up to ``samples_skipped``.

    This is the one list of them: the outbox counts by these names, and the metrics show them in these words.
    """

    stream: str
    """The outbox's id."""
    samples_read: Annotated[Count, _counter("Samples taken from the source")] = 0
    samples_held_out: Annotated[Count, _counter("Samples kept for local evaluation, never uploaded")] = 0
    samples_skipped: Annotated[Count, _counter("Samples that the job could do nothing with")] = 0
    samples_forwarded: Annotated[
        Count, _counter("Samples passed through the backbone for training, once they have a label")
    ] = 0
    samples_dropped: Annotated[Count, _counter("Samples in batches that a full outbox dropped")] = 0
    batches_dropped: Annotated[Count, _counter("Batches that a full outbox dropped")] = 0
    batches_refused: Annotated[Count, _counter("Batches that the trainer refused")] = 0
    batches_sent: Annotated[Count, _counter("Batches published, repeats included")] = 0
    bytes_up: Annotated[Count, _counter("Payload bytes published, repeats included", "sent_bytes_total")] = 0
    bytes_down: Annotated[Count, _counter("Payload bytes received", "received_bytes_total")] = 0
    forward_seconds: Annotated[Seconds, _counter("Time in the backbone's forward pass for training")] = 0.0
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
    messages_dropped: Annotated[Count, _counter("Messages to the device that found its mailbox full")] = 0
    weights_refused: Annotated[
        Count, _counter("Plans and weights not adopted: unsigned, altered, older or unfit")
    ] = 0
    tally: Tally | None = None
    """What that version answered on those samples."""
    samples_unlabelled: Annotated[
        Count, _counter("Samples without a label, forwarded once and kept until one comes")
    ] = 0
    unlabelled_waiting: Count = 0
    """How many of them have none yet."""
    unlabelled_dropped: Annotated[
        Count, _counter("Samples without a label that were dropped for want of room")
    ] = 0
    weights_run: ShortText = ""
    """The journal that ``weights_version`` is of."""
    streams_forked: Annotated[
        Count, _counter("New streams begun because an outbox was set back or copied, or changed its name")
    ] = 0
    samples_lost: Annotated[
        Count,
        _counter(
            "Samples receipted before the trainer's journal was set back, and gone from the device since"
        ),
    ] = 0
    samples_broken: Annotated[
        Count, _counter("Rows of the source that could not be read: not UTF-8, no text, fields too many")
    ] = 0
    skipped_empty: Annotated[
        Count, _counter("Samples skipped that had no text", "samples_skipped_empty_total")
    ] = 0
    skipped_unlabelled: Annotated[
        Count, _counter("Samples skipped that had no label", "samples_skipped_unlabelled_total")
    ] = 0
    skipped_label: Annotated[
        Count, _counter("Samples skipped whose label the job does not take", "samples_skipped_label_total")
    ] = 0
    skipped_activations: Annotated[
        Count,
        _counter(
            "Samples skipped whose activations were not finite, or too large to send",
            "samples_skipped_activations_total",
        ),
    ] = 0
    batches_reused: Annotated[
        Count, _counter("Batches of a split job whose earlier activations stood for them")
    ] = 0
    backward_passes: Annotated[Count, _counter("Backward passes of a split job")] = 0
    replies_stale: Annotated[
        Count, _counter("Answers to batches that came again, or for batches that nothing waits for")
    ] = 0
    gradients_lost: Annotated[
        Count, _counter("Steps of a device's own adapters that came into no average")
    ] = 0
    probe_accuracy: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    """On the same evaluation samples, of that version's linear start alone: a probe on what is uploaded."""
    unix_s: Seconds = 0.0
    """The device's clock when it said this; 0 from an agent that does not tell."""
    receipt_s: Seconds | None = None
    """From a batch's first publish to its receipt, of late."""
    reconnects: Count = 0
    """Connections to the broker after the first, since the agent was started."""
    trouble: ShortText = ""
    """In its own words, what keeps it from working, or what it waits for; empty if nothing does."""
    weights_bytes_down: Annotated[
        Count, _counter("Payload bytes of weights received", "received_weights_bytes_total")
    ] = 0
    final_only: bool = False
    """Whether it listens for finished versions of the weights only."""
    assignment: Count = 0
    """The version of the Assignment that it goes by; 0 while it goes by its tier's plan."""
    assignments_refused: Annotated[
        Count, _counter("Assignments not taken: unsigned, altered, older, or outside what the plan lets be")
    ] = 0
    sending_seconds: Seconds = 0.0
    """Time with something on its way to the trainer, since the agent joined the job."""
    memory_free_bytes: Count = 0
    """Memory that the machine has free now; 0 from an agent that does not tell."""
    batches_changed: Annotated[
        Count, _counter("Batches of a split job of which only their activations' change was sent")
    ] = 0

    def __post_init__(self) -> None:
        check_stream(self.stream)
        for name in (
            "forward_seconds",
            "sending_seconds",
            "temperature_celsius",
            "accuracy",
            "probe_accuracy",
            "unix_s",
            "receipt_s",
        ):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise DecodeError(f"{name} is not finite")


COUNTERS: Final[dict[str, tuple[str, str]]] = {
    field.name: (meta.extra["metric"] or f"{field.name}_total", str(meta.description))
    for field in msgspec.structs.fields(Telemetry)
    for meta in getattr(field.type, "__metadata__", ())
    if isinstance(meta, msgspec.Meta) and meta.extra
}
"""Its counters: a field, how its metric's name ends, and what it counts."""
