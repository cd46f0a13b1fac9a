"""What the demo found out, as a table for a person and as JSON with stable keys for a program. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from metrics.accounts import Account, account
from metrics.fleet_page.fleet import Device
from side_trainer.operator.audit import TrainerState
from sidestream.contract.messages import COUNTERS, Telemetry
from sidestream.contract.quality import total
from sidestream.contract.tasks import Task
from sidestream.contract.wire import prepared


@prepared
class TierReport(msgspec.Struct, frozen=True, kw_only=True):
    """One tier, or the fleet."""

    devices: int
    """How many."""
    accuracy: float | None
    """On the evaluation data, measured on the devices with the weights that they adopted; None if the task
    has none."""
    quality: dict[str, float]
    """Every measure of the task, the headline first (:mod:`sidestream.contract.quality`)."""
    probe: float | None = None
    """Accuracy of the linear start alone on the same data, as a yardstick; None if there is none."""
    account: Account
    """What became of the samples that devices read."""
    bytes_up: int
    """Payload bytes published, repeats included."""
    bytes_down: int
    """Payload bytes received."""
    peak_rss_bytes: int
    """Largest peak of an agent process."""
    version_min: int
    """Oldest version in use."""
    version_max: int
    """Newest."""

    @property
    def samples(self) -> int:
        """Forwarded for training."""
        return self.account.forwarded

    @property
    def bytes_up_per_sample(self) -> float:
        """Uplink payload a sample."""
        return self.bytes_up / self.samples if self.samples else 0.0


@prepared
class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    fleet: TierReport
    """All devices."""
    tiers: dict[str, TierReport]
    """By tier."""
    state: TrainerState
    """The trainer's journal and checkpoint."""
    messages_received: int
    """Activation messages at the trainer, duplicates included."""
    messages_rejected: int
    """Messages refused there."""
    versions_published: int
    """Weights versions."""
    trainer_peak_rss_bytes: int
    """Largest memory of the trainer."""
    left_out: tuple[str, ...]
    """Of the files given, how many rows no device got, and why."""
    wall_s: float
    """From the first process's start to the last device's final figures."""
    broker: str
    """Which broker it ran on."""

    @property
    def lost(self) -> int:
        """Samples that devices forwarded and the journal does not hold."""
        return self.fleet.samples - self.state.samples_unique

    @property
    def duplicated(self) -> int:
        """Samples that the journal holds more than once."""
        return self.state.samples - self.state.samples_unique

    @property
    def forwards_per_sample(self) -> float:
        """Backbone passes on devices for each sample trained."""
        trained = self.state.samples_trained_unique
        return self.fleet.samples / trained if trained else 0.0


def summarise(devices: Sequence[Device], task: Task) -> TierReport:
    """Sum up what devices said last."""
    told = [device.telemetry for device in devices if device.telemetry is not None]
    quality = total(one.tally for one in told if one.tally is not None).measures(task)
    return TierReport(
        devices=len(devices),
        accuracy=quality.get("accuracy"),
        quality=quality,
        probe=_probe(told),
        account=account({name: _sum(told, name) for name in COUNTERS}),
        bytes_up=_sum(told, "bytes_up"),
        bytes_down=_sum(told, "bytes_down"),
        peak_rss_bytes=max((one.peak_rss_bytes for one in told), default=0),
        version_min=min((one.weights_version for one in told), default=0),
        version_max=max((one.weights_version for one in told), default=0),
    )


def _probe(told: Sequence[Telemetry]) -> float | None:
    """Weighted by evaluation samples."""
    judged = [one for one in told if one.probe_accuracy is not None and one.evaluation_samples]
    samples = sum(one.evaluation_samples for one in judged)
    right = sum((one.probe_accuracy or 0.0) * one.evaluation_samples for one in judged)
    return right / samples if samples else None


def _sum(told: Sequence[Telemetry], name: str) -> int:
    return int(sum(getattr(one, name) for one in told))


def to_json(report: Report) -> dict[str, Any]:
    """The report under its stable keys."""
    return {
        "accuracy": {
            "overall": report.fleet.accuracy,
            "tiers": {name: tier.accuracy for name, tier in report.tiers.items()},
        },
        "probe": {
            "overall": report.fleet.probe,
            "tiers": {name: tier.probe for name, tier in report.tiers.items()},
        },
        "quality": {
            "overall": report.fleet.quality,
            "tiers": {name: tier.quality for name, tier in report.tiers.items()},
        },
        "samples": {
            "read": report.fleet.account.read,
            "held_out": report.fleet.account.held_out,
            "unused": report.fleet.account.unused,
            "unused_why": report.fleet.account.reasons,
            "left_out_of_data": list(report.left_out),
            "sent": report.fleet.samples,
            "trained_unique": report.state.samples_trained_unique,
            "lost": report.lost,
            "duplicated": report.duplicated,
        },
        "forwards_per_sample": report.forwards_per_sample,
        "bytes_up_per_sample": report.fleet.bytes_up_per_sample,
        "bytes_up_total": report.fleet.bytes_up,
        "bytes_down_total": report.fleet.bytes_down,
        "weights_version": report.fleet.version_min,
        "weights_versions_published": report.versions_published,
        "weights_digest": report.state.weights_digest,
        "messages": {"received": report.messages_received, "rejected": report.messages_rejected},
        "peak_rss_bytes": {
            "trainer": report.trainer_peak_rss_bytes,
            **{name: tier.peak_rss_bytes for name, tier in report.tiers.items()},
        },
        "wall_s": report.wall_s,
        "broker": report.broker,
    }


def to_table(report: Report) -> str:
    """The report for a person."""
    measures = list(report.fleet.quality)
    shown = [measure.replace("_", " ") for measure in measures]
    probe = ("linear probe",) if report.fleet.probe is not None else ()
    rows = [
        ("tier", "devices", *shown, *probe, "samples", "bytes up/sample", "down/device", "peak memory"),
        *(_row(name, tier, measures, bool(probe)) for name, tier in report.tiers.items()),
        _row("all", report.fleet, measures, bool(probe)),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    state = report.state
    return "\n".join(
        [
            *lines,
            "",
            *(f"data        {line}" for line in report.left_out),
            f"devices     {report.fleet.account}",
            f"samples     {report.fleet.samples} sent, {state.samples_trained_unique} trained, "
            f"{report.lost} lost, {report.duplicated} counted twice; "
            f"{report.forwards_per_sample:g} forward passes each",
            f"messages    {report.messages_received} received, {report.messages_rejected} rejected",
            f"weights     {report.versions_published} versions published; version {report.fleet.version_min} "
            f"in use, digest {state.weights_digest[:16]}",
            f"traffic     {_size(report.fleet.bytes_up)} up, {_size(report.fleet.bytes_down)} down in all",
            f"trainer     {_size(report.trainer_peak_rss_bytes)} peak memory",
            f"wall time   {report.wall_s:.0f} s on {report.broker}",
        ]
    )


def _row(name: str, tier: TierReport, measures: Sequence[str], probed: bool) -> tuple[str, ...]:
    return (
        name,
        str(tier.devices),
        *(f"{tier.quality[measure]:.3f}" if measure in tier.quality else "-" for measure in measures),
        *(("-" if tier.probe is None else f"{tier.probe:.3f}",) if probed else ()),
        str(tier.samples),
        f"{tier.bytes_up_per_sample:,.0f}",
        _size(tier.bytes_down / tier.devices if tier.devices else 0),
        _size(tier.peak_rss_bytes),
    )


def _size(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"
