"""Every metric of trainer and agent, defined once; what devices count is taken from their Telemetry.

A holder's class body is the catalogue, as data; an instance holds the live metrics, in the registry that it
is given::

    metrics = TrainerMetrics(registry)
    metrics.set_tiers(["pi", "jetson"])
    metrics.messages_rejected.labels(kind="status", reason=Reason.UNDECODABLE).inc()

Labels take their values from closed sets only, and every series exists from the start, so that a rate over a
counter's first increment is right and an alert sees 0, not nothing. What nobody has reported yet is NaN.
"""

from __future__ import annotations

import enum
import itertools
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from sidestream.contract.messages import COUNTERS
from sidestream.contract.quality import MEASURES
from sidestream.version import version

SECONDS: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
"""Buckets of every duration: 0.1 ms to 10 s."""
_LOSS_MEMORY: Final = 0.98


class _Label(str, enum.Enum):
    def __str__(self) -> str:  # what prometheus_client writes as the label's value
        return str(self.value)


class Kind(_Label):
    """Messages that devices send (label ``kind``)."""

    ACTIVATIONS = "activations"
    ADAPTER = "adapter"
    QUERY = "query"
    STATUS = "status"
    TELEMETRY = "telemetry"


class Asked(_Label):
    """What became of a device's query (label ``outcome``)."""

    ANSWERED = "answered"
    REFUSED = "refused"
    DROPPED = "dropped"


class Reason(_Label):
    """Why the trainer refused a message (label ``reason``)."""

    UNDECODABLE = "undecodable"
    MISMATCH = "mismatch"
    FINGERPRINT = "fingerprint"
    NONFINITE = "nonfinite"
    OVERSIZE = "oversize"
    UNKNOWN_TIER = "unknown_tier"
    RATE = "rate"
    QUARANTINE = "quarantine"
    FLOOD = "flood"
    OTHER = "other"


class Content(_Label):
    """What the trainer sends (label ``content``)."""

    WEIGHTS = "weights"
    CONTROL = "control"
    GRADIENT = "gradient"
    PREDICTION = "prediction"


class Source(_Label):
    """Where the rows of an optimiser update came from (label ``source``)."""

    UPLOAD = "upload"
    REPLAY = "replay"
    DEVICE = "device"
    IDLE = "idle"


class Measure(_Label):
    """How good answers are, as :mod:`sidestream.contract.quality` defines it (label ``measure``)."""

    ACCURACY = "accuracy"
    MACRO_F1 = "macro_f1"
    MATTHEWS = "matthews"
    MICRO_F1 = "micro_f1"
    PEARSON = "pearson"
    PERPLEXITY = "perplexity"
    RMSE = "rmse"


if {one.value for one in Measure} != set(MEASURES):  # pragma: no cover
    raise AssertionError("every measure needs a member")


CLOSED_SETS: Final[dict[str, type[_Label]]] = {
    "kind": Kind,
    "reason": Reason,
    "content": Content,
    "source": Source,
    "measure": Measure,
    "outcome": Asked,
}
"""The labels whose values are known at start; ``tier`` follows with the plan."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric, as data."""

    type: type[Counter] | type[Gauge] | type[Histogram]
    """Counter, gauge or histogram."""
    name: str
    """As Prometheus shows it."""
    help: str
    """For whoever reads the scrape."""
    labels: tuple[str, ...] = ()
    """Label names: ``tier``, or a key of :data:`CLOSED_SETS`."""
    unreported: bool = False
    """A gauge that is NaN until something is known."""


def counter(name: str, help: str, *labels: str) -> Any:
    """A counter, as data."""
    return Metric(type=Counter, name=f"sidestream_{name}", help=help, labels=labels)


def gauge(name: str, help: str, *labels: str, unreported: bool = False) -> Any:
    """A gauge, as data."""
    return Metric(type=Gauge, name=f"sidestream_{name}", help=help, labels=labels, unreported=unreported)


def _seconds(name: str, help: str) -> Any:
    return Metric(type=Histogram, name=f"sidestream_{name}", help=help)


def _device_counters(prefix: str, more: str, *labels: str) -> dict[str, Metric]:
    """By field of Telemetry."""
    return {
        field: counter(f"{prefix}_{name}", help + more, *labels) for field, (name, help) in COUNTERS.items()
    }


class _Holder:
    """Makes the metrics of its class body in a registry, with ``process_*`` and the build's version."""

    _device_specs: ClassVar[dict[str, Metric]]
    build_info: Gauge = gauge("build_info", "Always 1; the labels say what is running", "version", "python")

    def __init__(self, registry: CollectorRegistry) -> None:
        # Else every counter and histogram shows a second series, of no use to Prometheus.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        """Where its metrics are registered."""
        self._made: list[tuple[Metric, Counter | Gauge | Histogram]] = []
        for attribute, metric in self._specs().items():
            setattr(self, attribute, self._make(metric))
        self.device_counters: dict[str, Counter] = {
            field: self._make(metric) for field, metric in self._device_specs.items()
        }
        """By field of Telemetry; :mod:`metrics.telemetry` moves them."""
        ProcessCollector(registry=registry)
        self.build_info.labels(version(), platform.python_version()).set(1)

    @classmethod
    def _specs(cls) -> dict[str, Metric]:
        bodies = [vars(base) for base in reversed(cls.__mro__)]
        return {key: value for body in bodies for key, value in body.items() if isinstance(value, Metric)}

    @classmethod
    def catalogue(cls) -> tuple[Metric, ...]:
        """Every metric that an instance registers, ``process_*`` apart."""
        return (*cls._specs().values(), *cls._device_specs.values())

    def _make(self, metric: Metric) -> Any:
        options: dict[str, Any] = {"buckets": SECONDS} if metric.type is Histogram else {}
        made = metric.type(metric.name, metric.help, metric.labels, registry=self.registry, **options)
        self._made.append((metric, made))
        if "tier" not in metric.labels:
            _start(metric, made, ())
        return made


def _start(metric: Metric, made: Counter | Gauge | Histogram, tiers: tuple[str, ...]) -> None:
    """Create the series of ``tiers``, or of a metric without tiers."""
    sets = {"tier": tiers, **{label: tuple(map(str, values)) for label, values in CLOSED_SETS.items()}}
    if not set(metric.labels) <= set(sets):
        return  # build_info: one series, made where its labels are known
    for values in itertools.product(*(sets[label] for label in metric.labels)):
        series = made.labels(*values) if values else made
        if metric.unreported and isinstance(series, Gauge):
            series.set(math.nan)


class TrainerMetrics(_Holder):
    """What the trainer shows: its own work, and its fleet by tier."""

    _device_specs = _device_counters("device", ", summed over devices", "tier")

    messages_received: Counter = counter("messages_received_total", "Messages from devices", "kind")
    messages_journaled: Counter = counter(
        "messages_journaled_total", "Activation batches made durable", "tier"
    )
    messages_duplicate: Counter = counter(
        "messages_duplicate_total", "Activation batches that were journaled already", "tier"
    )
    messages_rejected: Counter = counter(
        "messages_rejected_total", "Messages that were refused", "kind", "reason"
    )
    messages_forked: Counter = counter(
        "messages_forked_total",
        "Activation batches of another history of their stream than the journaled one",
        "tier",
    )
    samples_journaled: Counter = counter("samples_journaled_total", "Distinct samples made durable", "tier")
    samples_repeated: Counter = counter(
        "samples_repeated_total", "Samples left out of a batch because they were journaled in another", "tier"
    )
    up_bytes: Counter = counter("up_bytes_total", "Payload bytes of activation batches received", "tier")
    down_bytes: Counter = counter("down_bytes_total", "Payload bytes published to devices", "tier", "content")
    weights_published: Counter = counter("weights_published_total", "Weights versions published", "tier")
    updates: Counter = counter("optimiser_updates_total", "Optimiser updates", "source")
    passes: Counter = counter("journal_passes_total", "Passes over the journal finished while idle")
    reconnects: Counter = counter("broker_reconnects_total", "Connections to the broker after the first")
    inbox_dropped: Counter = counter(
        "inbox_dropped_total", "Messages that found the inbox full; their devices send them again"
    )
    rejections_untold: Counter = counter(
        "rejections_untold_total", "Refusals that were not published below rejected/, being too many"
    )
    penalties: Counter = counter(
        "penalties_total",
        "Times that a device's topic was shut out for a while, for too much that is refused",
    )
    taken_over: Counter = counter(
        "sessions_taken_over_total", "Connections lost to another client with its client id, if told"
    )

    ingest_seconds: Histogram = _seconds(
        "ingest_seconds", "From a message's arrival in the inbox to its receipt"
    )
    journal_commit_seconds: Histogram = _seconds("journal_commit_seconds", "One commit of the journal")
    update_seconds: Histogram = _seconds("update_seconds", "One optimiser update")
    checkpoint_seconds: Histogram = _seconds("checkpoint_seconds", "One checkpoint, until it is durable")

    checkpoint_timestamp: Gauge = gauge(
        "checkpoint_timestamp_seconds",
        "Unix time of the last checkpoint; its age is time() minus this",
        unreported=True,
    )
    training_loss: Gauge = gauge(
        "training_loss", "Exponential mean of the loss of all that is learnt", "tier", unreported=True
    )
    head_bytes: Gauge = gauge(
        "head_bytes", "Memory that decoders' output heads take, in a language-model job"
    )
    unlearnt: Gauge = gauge("batches_unlearnt", "Batches in the journal that wait to be learnt from")
    cells_apart: Gauge = gauge(
        "cells_apart", "1 while a job of several cells does not learn, since not all their trainers are there"
    )
    replies_outstanding: Gauge = gauge(
        "replies_outstanding", "Answers to batches that their devices have not dealt with (split jobs)"
    )
    replies_expired: Counter = counter(
        "replies_expired_total", "Answers taken back because nobody wanted them for too long"
    )
    queries: Counter = counter(
        "queries_total",
        "Queries of devices that have the trainer predict (split jobs)",
        "outcome",
    )
    gradient_norm: Gauge = gauge("gradient_norm", "Norm of the last update's gradient before it was clipped")
    staleness: Gauge = gauge(
        "adapter_gradient_staleness_batches",
        "Batches served between the last one that a device answered and that answer",
    )
    weights_version: Gauge = gauge("weights_version", "Version last published: journal records folded in")
    weights_finished: Gauge = gauge(
        "weights_finished_version", "Version that devices get which want finished ones only"
    )
    broker_connected: Gauge = gauge("broker_connected", "1 while connected to the broker")
    inbox_messages: Gauge = gauge("inbox_messages", "Messages received and not yet handled")
    learner_backlog_records: Gauge = gauge("learner_backlog_records", "Journal records not yet folded in")
    quarantined: Gauge = gauge("devices_quarantined", "Devices whose batches are kept and not learnt from")
    topics_shut_out: Gauge = gauge(
        "topics_shut_out", "Topics of devices that are thrown away unread at the moment"
    )
    journal_bytes: Gauge = gauge("journal_bytes", "Size of the journal on disk")

    accuracy: Gauge = gauge(
        "device_accuracy_ratio",
        "Accuracy on held-out samples, reported by online devices, weighted by their number",
        "tier",
        unreported=True,
    )
    quality: Gauge = gauge(
        "device_quality",
        "Quality of online devices' answers on held-out samples, by their counts; NaN where a task has none",
        "tier",
        "measure",
        unreported=True,
    )
    evaluation_samples: Gauge = gauge(
        "device_evaluation_samples", "Held-out samples behind accuracy and quality", "tier"
    )
    version_lag: Gauge = gauge(
        "device_weights_lag_records",
        "Published minus adopted version of the online device that is furthest behind",
        "tier",
    )
    version_lag_seconds: Gauge = gauge(
        "device_weights_lag_seconds", "For how long a newer version has been out than that device's", "tier"
    )
    devices_online: Gauge = gauge("devices_online", "Devices online", "tier")
    devices_known: Gauge = gauge("devices_known", "Devices seen", "tier")
    devices_finished: Gauge = gauge("devices_finished", "Devices whose data has ended", "tier")
    devices_lost: Gauge = gauge("devices_lost", "Devices that vanished without a goodbye", "tier")
    outbox_fill: Gauge = gauge("device_outbox_fill_ratio", "How full the fullest outbox is", "tier")
    outbox_bytes: Gauge = gauge("device_outbox_bytes", "Bytes in outboxes, as last reported", "tier")
    outbox_batches: Gauge = gauge("device_outbox_batches", "Batches in outboxes, as last reported", "tier")
    unlabelled_waiting: Gauge = gauge(
        "device_unlabelled_waiting", "Samples that wait on devices for a label, as last reported", "tier"
    )
    peak_rss_bytes: Gauge = gauge("device_peak_rss_bytes", "Largest peak of resident memory reported", "tier")
    temperature: Gauge = gauge(
        "device_temperature_celsius", "Highest temperature of an online device", "tier", unreported=True
    )

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.tiers: tuple[str, ...] = ()
        """The tiers that have series."""
        self._loss: dict[str, float] = {}

    def set_tiers(self, names: Iterable[str]) -> None:
        """Create the series of the plan's tiers; those of a tier that has them go on as they are."""
        new = tuple(sorted(set(names) - set(self.tiers)))
        self.tiers += new
        for metric, made in self._made:
            if "tier" in metric.labels:
                _start(metric, made, new)

    @property
    def loss(self) -> dict[str, float]:
        """The mean loss by tier, of those that have one."""
        return dict(self._loss)

    def observe_loss(self, tier: str, loss: float, updates: int = 1) -> None:
        """Fold the mean loss of some updates on a tier's rows into its exponential mean, if it is finite."""
        if not math.isfinite(loss):
            return
        mean = self._loss.get(tier, loss)
        kept = _LOSS_MEMORY**updates
        self._loss[tier] = kept * mean + (1 - kept) * loss
        self.training_loss.labels(tier).set(self._loss[tier])


class AgentMetrics(_Holder):
    """What an agent shows of its one device; most of it is its telemetry, as it goes to the trainer."""

    _device_specs = _device_counters("agent", "")

    batch_forward_seconds: Histogram = _seconds(
        "agent_batch_forward_seconds", "One batch through the backbone"
    )
    receipt_seconds: Histogram = _seconds(
        "agent_receipt_seconds", "From a batch's first publish to its receipt"
    )
    evaluation_seconds: Histogram = _seconds(
        "agent_evaluation_seconds", "One evaluation on the held-out samples"
    )
    weights_adopted: Counter = counter("agent_weights_adopted_total", "Weights versions adopted")
    reconnects: Counter = counter(
        "agent_broker_reconnects_total", "Connections to the broker after the first"
    )
    taken_over: Counter = counter(
        "agent_sessions_taken_over_total",
        "Connections lost to another client with the agent's client id, where the broker tells",
    )
    broker_connected: Gauge = gauge("agent_broker_connected", "1 while connected to the broker")
    writes_denied: Gauge = gauge(
        "agent_writes_denied", "1 when the broker's access list denied what the device wrote last"
    )
    plan_revision: Gauge = gauge("agent_plan_revision", "Revision of the plan in force")
    outbox_batches: Gauge = gauge("agent_outbox_batches", "Batches waiting for a receipt")
    outbox_bytes: Gauge = gauge("agent_outbox_bytes", "Bytes waiting for a receipt")
    unlabelled_waiting: Gauge = gauge("agent_unlabelled_waiting", "Samples that wait for a label")
    weights_version: Gauge = gauge("agent_weights_version", "Version in use: journal records folded in")
    accuracy: Gauge = gauge(
        "agent_accuracy_ratio", "Accuracy of that version on held-out samples", unreported=True
    )
    quality: Gauge = gauge(
        "agent_quality", "Quality of that version's answers on held-out samples", "measure", unreported=True
    )
    evaluation_samples: Gauge = gauge(
        "agent_evaluation_samples", "Held-out samples behind accuracy and quality"
    )
    temperature: Gauge = gauge("agent_temperature_celsius", "Of the board, where it tells", unreported=True)
    finished: Gauge = gauge("agent_finished", "1 when the source has ended and every batch is receipted")


def total(counter: Counter) -> float:
    """A counter's value, summed over its series."""
    return sum(values(counter).values())


def level(gauge: Gauge) -> float:
    """The value of a gauge without labels."""
    (value,) = (sample.value for family in gauge.collect() for sample in family.samples)
    return float(value)


def values(counter: Counter) -> dict[tuple[str, ...], float]:
    """A counter's values by those of its labels, in their order."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in counter.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }
