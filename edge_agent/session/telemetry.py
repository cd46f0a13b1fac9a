"""What the device says of itself: telemetry for the trainer, a progress line for its log."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from edge_agent.session.machine import memory_bytes, temperature_celsius
from edge_agent.store.outbox import Outbox
from edge_agent.weights.adoption import InUse
from sidestream.contract.messages import Telemetry


def take_telemetry(outbox: Outbox, in_use: InUse | None, *, source_ended: bool) -> Telemetry:
    """The device's figures now."""
    batches, size = outbox.size()
    rss, peak_rss = memory_bytes()
    with outbox.unlabelled() as store:
        waiting = store.waiting()
    score = in_use.score if in_use is not None else None
    told = Telemetry(
        stream=outbox.stream,
        outbox_batches=batches,
        outbox_bytes=size,
        outbox_max_bytes=outbox.max_bytes,
        rss_bytes=rss,
        peak_rss_bytes=peak_rss,
        temperature_celsius=temperature_celsius(),
        weights_version=in_use.version if in_use is not None else 0,
        weights_run=in_use.run if in_use is not None else "",
        accuracy=score.measures.get("accuracy") if score is not None else None,
        tally=score.tally if score is not None else None,
        evaluation_samples=score.samples if score is not None else 0,
        finished=source_ended and batches == 0,
        unlabelled_waiting=waiting,
    )
    return msgspec.structs.replace(told, **outbox.counters())


def progress_line(telemetry: Telemetry, measures: Mapping[str, float]) -> str:
    """The same for people.

    Args:
        telemetry: The figures.
        measures: The quality of the version in use, by name.
    """
    uploaded = f"{telemetry.samples_forwarded} samples forwarded, {telemetry.samples_held_out} held out"
    skipped = f", {telemetry.samples_skipped} skipped" if telemetry.samples_skipped else ""
    late = f", {telemetry.unlabelled_waiting} wait for a label" if telemetry.samples_unlabelled else ""
    lost = f", {telemetry.samples_dropped} DROPPED" if telemetry.samples_dropped else ""
    lost += f", {telemetry.samples_lost} LOST with the trainer's journal" if telemetry.samples_lost else ""
    quality = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in measures.items())
    return (
        f"{uploaded}{skipped}{late}{lost}; {telemetry.outbox_batches} batches in the outbox; "
        f"weights version {telemetry.weights_version}{quality}"
    )
