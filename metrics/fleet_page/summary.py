"""What devices add up to: by tier, and tiers to the whole fleet. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

from sidestream.contract.messages import Telemetry
from sidestream.contract.quality import Tally, total

Counts: TypeAlias = Counter[str]
"""Sums of the counters in Telemetry by its fields, each outbox counted once; seconds have fractions."""

_Value = TypeVar("_Value", int, float)


class Heard(NamedTuple):
    """What a summary takes from a device."""

    telemetry: Telemetry | None
    """Its last."""
    online: bool
    """Whether it is there."""
    lost: bool
    """Whether it vanished."""
    judges: bool
    """Whether what it measures says something of the weights."""


@dataclass(frozen=True, kw_only=True)
class TierSummary:
    """A tier, or the whole fleet, at one moment."""

    devices_known: int = 0
    """Devices heard of."""
    devices_online: int = 0
    """Of those, announced, not gone, and not silent for long."""
    devices_finished: int = 0
    """Of the known ones: data ended, every batch receipted."""
    devices_lost: int = 0
    """Of the known ones: not there, and never said goodbye."""
    counts: Counts = field(default_factory=Counts)
    """Sums since this trainer started, and over the life of each outbox it heard of."""
    accuracy: float | None = None
    """Mean over devices that are online or left when all was done, weighted by their evaluation samples; None
    if none has reported."""
    evaluation_samples: int = 0
    """Samples behind it."""
    tally: Tally = field(default_factory=Tally)
    """What those answered on them, added up."""
    probe_accuracy: float | None = None
    """As ``accuracy``, of the linear starts alone."""
    probe_samples: int = 0
    """Samples behind that."""
    version_min: int | None = None
    """Oldest weights in use on an online device; None if none has reported."""
    version_max: int | None = None
    """Newest."""
    every_min: int | None = None
    """Oldest on one that wants every version."""
    final_min: int | None = None
    """Oldest on one that wants finished versions only."""
    outbox_batches: int = 0
    """Batches waiting, as last reported, offline devices included."""
    outbox_bytes: int = 0
    """Their bytes."""
    unlabelled_waiting: int = 0
    """Samples that wait for a label, as last reported, offline devices included."""
    outbox_fill: float = 0.0
    """How full the fullest outbox is, 0 to 1, among devices that tell its size."""
    peak_rss_bytes: int = 0
    """Largest peak of resident memory of any known device."""
    temperature_celsius: float | None = None
    """Highest of an online device."""


def summed(devices: Sequence[Heard], counts: Counts) -> TierSummary:
    """What a tier adds up to.

    Args:
        devices: All that are known.
        counts: Of its counters, which outlive devices.
    """
    told = [one.telemetry for one in devices if one.telemetry is not None]
    live = [one.telemetry for one in devices if one.online and one.telemetry is not None]
    sane = [one.telemetry for one in devices if one.judges and one.telemetry is not None]
    accuracy, evaluation_samples = _mean((one.accuracy, one.evaluation_samples) for one in sane)
    probe_accuracy, probe_samples = _mean((one.probe_accuracy, one.evaluation_samples) for one in sane)
    versions = [one.weights_version for one in live]
    return TierSummary(
        devices_known=len(devices),
        devices_online=sum(one.online for one in devices),
        devices_finished=sum(one.finished for one in told),
        devices_lost=sum(one.lost for one in devices),
        counts=Counts(counts),
        accuracy=accuracy,
        evaluation_samples=evaluation_samples,
        tally=total(one.tally for one in sane if one.tally is not None),
        probe_accuracy=probe_accuracy,
        probe_samples=probe_samples,
        version_min=min(versions, default=None),
        version_max=max(versions or [one.weights_version for one in sane], default=None),
        every_min=min((one.weights_version for one in live if not one.final_only), default=None),
        final_min=min((one.weights_version for one in live if one.final_only), default=None),
        outbox_batches=sum(one.outbox_batches for one in told),
        outbox_bytes=sum(one.outbox_bytes for one in told),
        unlabelled_waiting=sum(one.unlabelled_waiting for one in told),
        outbox_fill=max(map(outbox_fill, told), default=0.0),
        peak_rss_bytes=max((one.peak_rss_bytes for one in told), default=0),
        temperature_celsius=max(_known(one.temperature_celsius for one in live), default=None),
    )


def together(summaries: Collection[TierSummary]) -> TierSummary:
    """What tiers add up to."""
    accuracy, evaluation_samples = _mean((one.accuracy, one.evaluation_samples) for one in summaries)
    probe_accuracy, probe_samples = _mean((one.probe_accuracy, one.probe_samples) for one in summaries)
    return TierSummary(
        devices_known=sum(one.devices_known for one in summaries),
        devices_online=sum(one.devices_online for one in summaries),
        devices_finished=sum(one.devices_finished for one in summaries),
        devices_lost=sum(one.devices_lost for one in summaries),
        counts=sum((one.counts for one in summaries), Counts()),
        accuracy=accuracy,
        evaluation_samples=evaluation_samples,
        tally=total(one.tally for one in summaries),
        probe_accuracy=probe_accuracy,
        probe_samples=probe_samples,
        version_min=min(_known(one.version_min for one in summaries), default=None),
        version_max=max(_known(one.version_max for one in summaries), default=None),
        every_min=min(_known(one.every_min for one in summaries), default=None),
        final_min=min(_known(one.final_min for one in summaries), default=None),
        outbox_batches=sum(one.outbox_batches for one in summaries),
        outbox_bytes=sum(one.outbox_bytes for one in summaries),
        unlabelled_waiting=sum(one.unlabelled_waiting for one in summaries),
        outbox_fill=max((one.outbox_fill for one in summaries), default=0.0),
        peak_rss_bytes=max((one.peak_rss_bytes for one in summaries), default=0),
        temperature_celsius=max(_known(one.temperature_celsius for one in summaries), default=None),
    )


def outbox_fill(telemetry: Telemetry) -> float:
    """How full an outbox is, 0 to 1; 0 where the agent does not tell its size."""
    most = telemetry.outbox_max_bytes
    return min(1.0, telemetry.outbox_bytes / most) if most else 0.0


def _mean(measured: Iterable[tuple[float | None, int]]) -> tuple[float | None, int]:
    """The mean of figures, each weighted by the samples behind it, and how many those are; None of none."""
    known = [(value, weight) for value, weight in measured if value is not None and weight]
    samples = sum(weight for _, weight in known)
    return (sum(value * weight for value, weight in known) / samples if samples else None), samples


def _known(values: Iterable[_Value | None]) -> list[_Value]:
    return [value for value in values if value is not None]
