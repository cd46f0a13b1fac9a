"""From what devices report to metrics: on the trainer for its fleet, on an agent for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping

from metrics.catalogue import AgentMetrics, Measure, TrainerMetrics
from metrics.fleet_page.fleet import Fleet, advance
from metrics.fleet_page.summary import Counts, TierSummary
from metrics.fleet_page.versions import VersionTimes
from sidestream.contract.messages import COUNTERS, Telemetry
from sidestream.contract.tasks import Task


class FleetExporter:
    """Shows a :class:`~metrics.fleet_page.fleet.Fleet` in the trainer's metrics.

    Call :meth:`update` every second or so on the thread that feeds the fleet: metrics may be scraped from
    any thread, the fleet may not. Device counters start at 0 with the trainer and then run over the whole
    life of each outbox that it hears of.
    """

    def __init__(self, metrics: TrainerMetrics, task: Task = Task.TEXT_CLASSIFICATION) -> None:
        self._metrics = metrics
        self._task = task
        self._shown: dict[str, Counts] = {}
        self._versions = VersionTimes()
        self._finished = VersionTimes()

    def update(self, fleet: Fleet, *, version: int, now: float, finished: int = 0) -> dict[str, TierSummary]:
        """Set every figure of the fleet.

        Args:
            fleet: Summed up.
            version: The one last published.
            now: On the fleet's clock.
            finished: The one for devices that want no other than finished ones.

        Returns:
            What the fleet is summed up to, by tier.
        """
        metrics = self._metrics
        self._versions.note(version, now)
        self._finished.note(finished, now)
        summaries = fleet.summaries(now)
        for tier, summary in summaries.items():
            metrics.devices_online.labels(tier).set(summary.devices_online)
            metrics.devices_known.labels(tier).set(summary.devices_known)
            metrics.devices_finished.labels(tier).set(summary.devices_finished)
            metrics.accuracy.labels(tier).set(_or_nan(summary.accuracy))
            measures = summary.tally.measures(self._task)
            for measure in Measure:
                metrics.quality.labels(tier, measure).set(_or_nan(measures.get(measure.value)))
            metrics.evaluation_samples.labels(tier).set(summary.evaluation_samples)
            wanted = ((version, summary.every_min), (finished, summary.final_min))
            lag = max(0, *(0 if least is None else newest - least for newest, least in wanted))
            metrics.version_lag.labels(tier).set(lag)
            outdated_s = self._versions.outdated_s(summary.every_min, now)
            outdated_s = max(outdated_s, self._finished.outdated_s(summary.final_min, now))
            metrics.version_lag_seconds.labels(tier).set(outdated_s)
            metrics.devices_lost.labels(tier).set(summary.devices_lost)
            metrics.outbox_fill.labels(tier).set(summary.outbox_fill)
            metrics.outbox_bytes.labels(tier).set(summary.outbox_bytes)
            metrics.outbox_batches.labels(tier).set(summary.outbox_batches)
            metrics.unlabelled_waiting.labels(tier).set(summary.unlabelled_waiting)
            metrics.peak_rss_bytes.labels(tier).set(summary.peak_rss_bytes)
            metrics.temperature.labels(tier).set(_or_nan(summary.temperature_celsius))
            shown = self._shown.get(tier, Counts())
            for name in COUNTERS:
                grown = summary.counts[name] - shown[name]
                metrics.device_counters[name].labels(tier).inc(max(0, grown))
            self._shown[tier] = summary.counts
        return summaries


class DeviceExporter:
    """Shows an agent's own telemetry in its metrics."""

    def __init__(self, metrics: AgentMetrics) -> None:
        self._metrics = metrics
        self._shown = Counts()

    def update(self, telemetry: Telemetry, measures: Mapping[str, float]) -> None:
        """Set every figure that ``telemetry`` holds; the counters continue those of the outbox.

        Args:
            telemetry: What the agent reports.
            measures: The quality of the version in use, by measure.
        """
        metrics, grown = self._metrics, Counts()
        advance(grown, self._shown, telemetry)
        for name, counter in metrics.device_counters.items():
            counter.inc(grown[name])
        metrics.outbox_batches.set(telemetry.outbox_batches)
        metrics.outbox_bytes.set(telemetry.outbox_bytes)
        metrics.unlabelled_waiting.set(telemetry.unlabelled_waiting)
        metrics.weights_version.set(telemetry.weights_version)
        metrics.accuracy.set(_or_nan(telemetry.accuracy))
        for measure in Measure:
            metrics.quality.labels(measure).set(_or_nan(measures.get(measure.value)))
        metrics.evaluation_samples.set(telemetry.evaluation_samples)
        metrics.temperature.set(_or_nan(telemetry.temperature_celsius))
        metrics.finished.set(telemetry.finished)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
