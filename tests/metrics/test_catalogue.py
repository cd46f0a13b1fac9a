"""Metric names are a promise to dashboards and alerts: what a scrape shows is pinned here."""

from __future__ import annotations

import math
import shutil
import subprocess

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from metrics.broker_figures import BROKER_FIGURES
from metrics.catalogue import (
    CLOSED_SETS,
    AgentMetrics,
    Kind,
    Reason,
    TrainerMetrics,
    total,
    values,
)
from metrics.fleet_page.device_series import DEVICE_SERIES, DEVICES_UNLISTED
from sidestream.contract.messages import COUNTERS, Telemetry

TRAINER = {
    "sidestream_build_info": ("version", "python"),
    "sidestream_messages_received_total": ("kind",),
    "sidestream_messages_journaled_total": ("tier",),
    "sidestream_messages_duplicate_total": ("tier",),
    "sidestream_messages_rejected_total": ("kind", "reason"),
    "sidestream_messages_forked_total": ("tier",),
    "sidestream_samples_journaled_total": ("tier",),
    "sidestream_samples_repeated_total": ("tier",),
    "sidestream_up_bytes_total": ("tier",),
    "sidestream_down_bytes_total": ("tier", "content"),
    "sidestream_weights_published_total": ("tier",),
    "sidestream_optimiser_updates_total": ("source",),
    "sidestream_journal_passes_total": (),
    "sidestream_broker_reconnects_total": (),
    "sidestream_inbox_dropped_total": (),
    "sidestream_rejections_untold_total": (),
    "sidestream_penalties_total": (),
    "sidestream_sessions_taken_over_total": (),
    "sidestream_ingest_seconds": (),
    "sidestream_journal_commit_seconds": (),
    "sidestream_update_seconds": (),
    "sidestream_checkpoint_seconds": (),
    "sidestream_checkpoint_timestamp_seconds": (),
    "sidestream_training_loss": ("tier",),
    "sidestream_head_bytes": (),
    "sidestream_batches_unlearnt": (),
    "sidestream_cells_apart": (),
    "sidestream_replies_outstanding": (),
    "sidestream_replies_expired_total": (),
    "sidestream_queries_total": ("outcome",),
    "sidestream_gradient_norm": (),
    "sidestream_adapter_gradient_staleness_batches": (),
    "sidestream_autotune_choices_total": ("tier", "quantity"),
    "sidestream_autotune_devices_advised": ("tier",),
    "sidestream_autotune_devices_assigned": ("tier",),
    "sidestream_autotune_devices_unheeding": ("tier",),
    "sidestream_weights_version": (),
    "sidestream_weights_finished_version": (),
    "sidestream_broker_connected": (),
    "sidestream_inbox_messages": (),
    "sidestream_learner_backlog_records": (),
    "sidestream_topics_shut_out": (),
    "sidestream_journal_bytes": (),
    "sidestream_device_accuracy_ratio": ("tier",),
    "sidestream_device_quality": ("tier", "measure"),
    "sidestream_device_evaluation_samples": ("tier",),
    "sidestream_device_weights_lag_records": ("tier",),
    "sidestream_device_weights_lag_seconds": ("tier",),
    "sidestream_devices_online": ("tier",),
    "sidestream_devices_quarantined": (),
    "sidestream_devices_known": ("tier",),
    "sidestream_devices_finished": ("tier",),
    "sidestream_devices_lost": ("tier",),
    "sidestream_device_outbox_fill_ratio": ("tier",),
    "sidestream_device_outbox_bytes": ("tier",),
    "sidestream_device_outbox_batches": ("tier",),
    "sidestream_device_unlabelled_waiting": ("tier",),
    "sidestream_device_peak_rss_bytes": ("tier",),
    "sidestream_device_temperature_celsius": ("tier",),
    "sidestream_device_samples_read_total": ("tier",),
    "sidestream_device_samples_held_out_total": ("tier",),
    "sidestream_device_samples_skipped_total": ("tier",),
    "sidestream_device_samples_broken_total": ("tier",),
    "sidestream_device_samples_skipped_empty_total": ("tier",),
    "sidestream_device_samples_skipped_unlabelled_total": ("tier",),
    "sidestream_device_samples_skipped_label_total": ("tier",),
    "sidestream_device_samples_skipped_activations_total": ("tier",),
    "sidestream_device_batches_reused_total": ("tier",),
    "sidestream_device_batches_changed_total": ("tier",),
    "sidestream_device_assignments_refused_total": ("tier",),
    "sidestream_device_backward_passes_total": ("tier",),
    "sidestream_device_replies_stale_total": ("tier",),
    "sidestream_device_gradients_lost_total": ("tier",),
    "sidestream_device_samples_forwarded_total": ("tier",),
    "sidestream_device_samples_dropped_total": ("tier",),
    "sidestream_device_batches_dropped_total": ("tier",),
    "sidestream_device_batches_refused_total": ("tier",),
    "sidestream_device_batches_sent_total": ("tier",),
    "sidestream_device_sent_bytes_total": ("tier",),
    "sidestream_device_received_bytes_total": ("tier",),
    "sidestream_device_received_weights_bytes_total": ("tier",),
    "sidestream_device_messages_dropped_total": ("tier",),
    "sidestream_device_weights_refused_total": ("tier",),
    "sidestream_device_samples_unlabelled_total": ("tier",),
    "sidestream_device_unlabelled_dropped_total": ("tier",),
    "sidestream_device_streams_forked_total": ("tier",),
    "sidestream_device_samples_lost_total": ("tier",),
    "sidestream_device_forward_seconds_total": ("tier",),
}
BROKER = (
    "sidestream_broker_clients_connected",
    "sidestream_broker_packets_received_total",
    "sidestream_broker_packets_sent_total",
    "sidestream_broker_publishes_received_total",
    "sidestream_broker_publishes_sent_total",
    "sidestream_broker_publishes_dropped_total",
    "sidestream_broker_received_bytes_total",
    "sidestream_broker_sent_bytes_total",
    "sidestream_broker_stored_messages",
    "sidestream_broker_stored_bytes",
    "sidestream_broker_retained_messages",
    "sidestream_broker_subscriptions",
    "sidestream_broker_heap_bytes",
    "sidestream_broker_uptime_seconds",
)
ONE_DEVICE = (
    "sidestream_one_device_online",
    "sidestream_one_device_heard_timestamp_seconds",
    "sidestream_one_device_samples",
    "sidestream_one_device_samples_read",
    "sidestream_one_device_samples_unused",
    "sidestream_one_device_sent_bytes",
    "sidestream_one_device_outbox_bytes",
    "sidestream_one_device_weights_version",
    "sidestream_one_device_quality",
)
AGENT = (
    "sidestream_build_info",
    "sidestream_agent_batch_forward_seconds",
    "sidestream_agent_receipt_seconds",
    "sidestream_agent_evaluation_seconds",
    "sidestream_agent_weights_adopted_total",
    "sidestream_agent_broker_reconnects_total",
    "sidestream_agent_broker_connected",
    "sidestream_agent_writes_denied",
    "sidestream_agent_plan_revision",
    "sidestream_agent_outbox_batches",
    "sidestream_agent_outbox_bytes",
    "sidestream_agent_unlabelled_waiting",
    "sidestream_agent_weights_version",
    "sidestream_agent_accuracy_ratio",
    "sidestream_agent_quality",
    "sidestream_agent_evaluation_samples",
    "sidestream_agent_temperature_celsius",
    "sidestream_agent_finished",
    "sidestream_agent_samples_read_total",
    "sidestream_agent_samples_held_out_total",
    "sidestream_agent_samples_skipped_total",
    "sidestream_agent_samples_broken_total",
    "sidestream_agent_samples_skipped_empty_total",
    "sidestream_agent_samples_skipped_unlabelled_total",
    "sidestream_agent_samples_skipped_label_total",
    "sidestream_agent_samples_skipped_activations_total",
    "sidestream_agent_batches_reused_total",
    "sidestream_agent_batches_changed_total",
    "sidestream_agent_assignments_refused_total",
    "sidestream_agent_backward_passes_total",
    "sidestream_agent_replies_stale_total",
    "sidestream_agent_gradients_lost_total",
    "sidestream_agent_samples_forwarded_total",
    "sidestream_agent_samples_dropped_total",
    "sidestream_agent_batches_dropped_total",
    "sidestream_agent_batches_refused_total",
    "sidestream_agent_batches_sent_total",
    "sidestream_agent_sent_bytes_total",
    "sidestream_agent_received_bytes_total",
    "sidestream_agent_received_weights_bytes_total",
    "sidestream_agent_messages_dropped_total",
    "sidestream_agent_weights_refused_total",
    "sidestream_agent_samples_unlabelled_total",
    "sidestream_agent_unlabelled_dropped_total",
    "sidestream_agent_streams_forked_total",
    "sidestream_agent_samples_lost_total",
    "sidestream_agent_sessions_taken_over_total",
    "sidestream_agent_forward_seconds_total",
)


def _trainer(*tiers: str) -> tuple[TrainerMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)
    metrics.set_tiers(tiers)
    return metrics, registry


def _series(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_trainers_names_and_labels_are_frozen() -> None:
    assert {metric.name: metric.labels for metric in TrainerMetrics.catalogue()} == TRAINER


def test_the_agents_names_are_frozen() -> None:
    assert sorted(metric.name for metric in AgentMetrics.catalogue()) == sorted(AGENT)


def test_the_brokers_and_the_single_devices_names_are_frozen() -> None:
    assert tuple(metric.name for metric in BROKER_FIGURES.values()) == BROKER
    assert tuple(metric.name for metric in DEVICE_SERIES.values()) == ONE_DEVICE
    assert {metric.labels for metric in DEVICE_SERIES.values()} == {("tier", "device")}
    assert DEVICES_UNLISTED.name == "sidestream_devices_unlisted"


def test_every_metric_of_the_catalogue_is_in_a_scrape_from_the_start() -> None:
    _, registry = _trainer("pi")
    names = {name for name, _ in _series(registry)}
    for metric in TrainerMetrics.catalogue():
        assert {metric.name, f"{metric.name}_count"} & names, metric.name


def test_a_scrape_shows_nothing_but_the_catalogue_and_the_process() -> None:
    _, registry = _trainer("pi")
    known = {metric.name for metric in TrainerMetrics.catalogue()}
    for name, _ in _series(registry):
        family = name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
        assert family in known or name in known or name.startswith("process_"), name


def test_every_reason_and_kind_has_a_series_before_it_happens() -> None:
    metrics, registry = _trainer()
    metrics.messages_rejected.labels(kind=Kind.STATUS, reason=Reason.UNDECODABLE).inc()
    rejected = {key: v for key, v in _series(registry).items() if "rejected" in key[0]}
    assert len(rejected) == len(Kind) * len(Reason)
    key = ("sidestream_messages_rejected_total", (("kind", "status"), ("reason", "undecodable")))
    assert rejected[key] == 1
    assert sum(rejected.values()) == 1


def test_tiers_get_their_series_once_and_keep_their_counts() -> None:
    metrics, registry = _trainer("pi")
    metrics.samples_journaled.labels("pi").inc(16)
    metrics.set_tiers(["jetson", "pi"])
    series = _series(registry)
    assert metrics.tiers == ("pi", "jetson")
    assert series["sidestream_samples_journaled_total", (("tier", "pi"),)] == 16
    assert series["sidestream_samples_journaled_total", (("tier", "jetson"),)] == 0
    assert series["sidestream_down_bytes_total", (("content", "control"), ("tier", "jetson"))] == 0


def test_what_nobody_has_reported_is_nan_not_zero() -> None:
    _, registry = _trainer("pi")
    series = _series(registry)
    assert math.isnan(series["sidestream_device_accuracy_ratio", (("tier", "pi"),)])
    assert math.isnan(series["sidestream_training_loss", (("tier", "pi"),)])
    assert math.isnan(series["sidestream_checkpoint_timestamp_seconds", ()])


def test_durations_have_buckets_from_a_tenth_of_a_millisecond_to_ten_seconds() -> None:
    metrics, registry = _trainer()
    metrics.update_seconds.observe(0.0002)
    buckets = {
        float(dict(labels)["le"]): value
        for (name, labels), value in _series(registry).items()
        if name == "sidestream_update_seconds_bucket"
    }
    assert min(buckets) == 0.0001 and max(b for b in buckets if b < math.inf) == 10
    assert (buckets[0.0001], buckets[0.00025]) == (0, 1)


def test_many_updates_weigh_as_much_as_one_after_another() -> None:
    (one, _), (many, _) = _trainer("pi"), _trainer("pi")
    for metrics in (one, many):
        metrics.observe_loss("pi", 2.0)
    for _ in range(16):
        one.observe_loss("pi", 1.0)
    many.observe_loss("pi", 1.0, 16)
    assert many.loss["pi"] == pytest.approx(one.loss["pi"])


def test_the_loss_is_an_exponential_mean_that_survives_a_nan() -> None:
    metrics, registry = _trainer("pi")
    key = ("sidestream_training_loss", (("tier", "pi"),))
    metrics.observe_loss("pi", math.nan)
    assert math.isnan(_series(registry)[key])
    metrics.observe_loss("pi", 2.0)
    assert _series(registry)[key] == 2.0
    metrics.observe_loss("pi", 1.0)
    metrics.observe_loss("pi", math.inf)
    assert _series(registry)[key] == pytest.approx(1.98)


def test_labels_come_from_closed_sets_only() -> None:
    for metric in (*TrainerMetrics.catalogue(), *AgentMetrics.catalogue()):
        if metric.name != "sidestream_build_info":
            assert set(metric.labels) <= {"tier", *CLOSED_SETS}, metric.name


def test_every_counter_of_telemetry_has_a_metric_on_either_end_and_what_only_counts_is_one() -> None:
    last_words = {"outbox_batches", "outbox_bytes", "rss_bytes", "peak_rss_bytes", "temperature_celsius"}
    last_words |= {"stream", "weights_run", "weights_version", "accuracy", "evaluation_samples", "finished"}
    last_words |= {"outbox_max_bytes", "tally", "unlabelled_waiting"}
    last_words |= {"unix_s", "receipt_s", "reconnects", "trouble", "probe_accuracy", "final_only"}
    last_words |= {"assignment", "sending_seconds", "memory_free_bytes"}
    assert set(COUNTERS) == {field.name for field in msgspec.structs.fields(Telemetry)} - last_words
    for holder in (TrainerMetrics(CollectorRegistry()), AgentMetrics(CollectorRegistry())):
        assert list(holder.device_counters) == list(COUNTERS)


def test_a_counter_can_be_read_back_by_label_and_summed() -> None:
    metrics, _ = _trainer("pi", "jetson")
    metrics.samples_journaled.labels("pi").inc(3)
    metrics.samples_journaled.labels("jetson").inc(4)
    assert values(metrics.samples_journaled) == {("jetson",): 4, ("pi",): 3}
    assert total(metrics.samples_journaled) == 7


def test_two_holders_live_in_one_process_in_registries_of_their_own() -> None:
    one, registry = _trainer("pi")
    _, other = _trainer("pi")
    one.passes.inc()
    assert _series(registry)["sidestream_journal_passes_total", ()] == 1
    assert _series(other)["sidestream_journal_passes_total", ()] == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_say() -> None:
    trainer, agent = _trainer("pi", "jetson")[1], CollectorRegistry()
    AgentMetrics(agent)
    for registry in (trainer, agent):
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True, timeout=60
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
