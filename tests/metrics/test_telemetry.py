"""What devices report reaches the scrape."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry

from metrics.catalogue import AgentMetrics, TrainerMetrics
from metrics.fleet_page.fleet import Fleet
from metrics.telemetry import DeviceExporter, FleetExporter
from sidestream.contract.messages import Status, Telemetry

A, B = "a" * 32, "b" * 32


def _value(registry: CollectorRegistry, name: str, tier: str | None = "pi") -> float:
    value = registry.get_sample_value(f"sidestream_{name}", {"tier": tier} if tier else {})
    assert value is not None, name
    return value


def _fleet_with_one_device() -> Fleet:
    fleet = Fleet(["pi", "jetson"])
    fleet.on_status("pi", "d", Status(state="online", birth=1, stream=A), 0)
    told = Telemetry(
        stream=A,
        samples_forwarded=32,
        samples_dropped=4,
        bytes_up=1000,
        outbox_batches=2,
        outbox_bytes=300,
        unlabelled_waiting=6,
        weights_version=40,
        accuracy=0.75,
        evaluation_samples=8,
        peak_rss_bytes=123,
        temperature_celsius=51.5,
    )
    fleet.on_telemetry("pi", "d", told, 0)
    return fleet


def test_the_fleets_figures_are_shown_by_tier() -> None:
    registry, fleet = CollectorRegistry(), _fleet_with_one_device()
    metrics = TrainerMetrics(registry)
    metrics.set_tiers(fleet.tiers)
    FleetExporter(metrics).update(fleet, version=45, now=1)
    assert _value(registry, "devices_online") == 1
    assert _value(registry, "device_accuracy_ratio") == 0.75
    assert _value(registry, "device_evaluation_samples") == 8
    assert _value(registry, "device_weights_lag_records") == 5
    assert _value(registry, "device_outbox_bytes") == 300
    assert _value(registry, "device_outbox_batches") == 2
    assert _value(registry, "device_unlabelled_waiting") == 6
    assert _value(registry, "device_peak_rss_bytes") == 123
    assert _value(registry, "device_temperature_celsius") == 51.5
    assert _value(registry, "device_samples_forwarded_total") == 32
    assert _value(registry, "device_samples_dropped_total") == 4
    assert _value(registry, "device_sent_bytes_total") == 1000
    assert _value(registry, "devices_online", "jetson") == 0
    assert math.isnan(_value(registry, "device_accuracy_ratio", "jetson"))


def test_counters_rise_by_what_is_new_however_often_they_are_shown() -> None:
    registry, fleet = CollectorRegistry(), _fleet_with_one_device()
    metrics = TrainerMetrics(registry)
    metrics.set_tiers(fleet.tiers)
    exporter = FleetExporter(metrics)
    for _ in range(3):
        exporter.update(fleet, version=45, now=1)
    assert _value(registry, "device_samples_forwarded_total") == 32
    fleet.on_telemetry("pi", "d", Telemetry(stream=B, samples_forwarded=1), 2)
    exporter.update(fleet, version=45, now=2)
    assert _value(registry, "device_samples_forwarded_total") == 33


def test_a_device_that_goes_takes_its_accuracy_along() -> None:
    registry, fleet = CollectorRegistry(), _fleet_with_one_device()
    metrics = TrainerMetrics(registry)
    metrics.set_tiers(fleet.tiers)
    exporter = FleetExporter(metrics)
    exporter.update(fleet, version=45, now=1)
    fleet.on_status("pi", "d", Status(state="offline", birth=1, stream=A), 2)
    exporter.update(fleet, version=60, now=2)
    assert math.isnan(_value(registry, "device_accuracy_ratio"))
    assert _value(registry, "device_weights_lag_records") == 0
    assert _value(registry, "devices_online") == 0
    assert _value(registry, "device_outbox_bytes") == 300


def test_a_device_with_weights_of_another_run_does_not_lag_negatively() -> None:
    registry, fleet = CollectorRegistry(), _fleet_with_one_device()
    metrics = TrainerMetrics(registry)
    metrics.set_tiers(fleet.tiers)
    FleetExporter(metrics).update(fleet, version=3, now=1)
    assert _value(registry, "device_weights_lag_records") == 0


def test_a_device_that_wants_finished_versions_lags_behind_those_only() -> None:
    registry, fleet = CollectorRegistry(), _fleet_with_one_device()
    metrics = TrainerMetrics(registry)
    metrics.set_tiers(fleet.tiers)
    exporter = FleetExporter(metrics)
    fleet.on_telemetry("pi", "d", Telemetry(stream=A, weights_version=40, final_only=True), 1)
    for version, finished, now in ((40, 40, 1.0), (45, 40, 10.0), (50, 40, 20.0)):
        exporter.update(fleet, version=version, finished=finished, now=now)
    assert (
        _value(registry, "device_weights_lag_records") == _value(registry, "device_weights_lag_seconds") == 0
    )
    for now in (21.0, 24.0):
        exporter.update(fleet, version=50, finished=48, now=now)
    assert _value(registry, "device_weights_lag_records") == 8
    assert _value(registry, "device_weights_lag_seconds") == 3


def test_the_lag_in_seconds_counts_from_the_first_version_that_a_device_lacks() -> None:
    registry, fleet = CollectorRegistry(), _fleet_with_one_device()
    metrics = TrainerMetrics(registry)
    metrics.set_tiers(fleet.tiers)
    exporter = FleetExporter(metrics)
    for version, now in ((40, 1.0), (45, 10.0), (50, 30.0)):
        exporter.update(fleet, version=version, now=now)
    assert _value(registry, "device_weights_lag_seconds") == 20
    fleet.on_telemetry("pi", "d", Telemetry(stream=A, weights_version=45), 35)
    exporter.update(fleet, version=50, now=35.0)
    assert _value(registry, "device_weights_lag_seconds") == 5
    fleet.on_telemetry("pi", "d", Telemetry(stream=A, weights_version=50), 36)
    exporter.update(fleet, version=50, now=36.0)
    assert _value(registry, "device_weights_lag_seconds") == 0


def test_an_agent_shows_its_own_telemetry() -> None:
    registry = CollectorRegistry()
    exporter = DeviceExporter(AgentMetrics(registry))
    told = Telemetry(
        stream=A, samples_read=20, forward_seconds=1.5, accuracy=0.5, weights_version=7, finished=True
    )
    for _ in range(2):
        exporter.update(told, {})
    assert _value(registry, "agent_samples_read_total", None) == 20
    assert _value(registry, "agent_forward_seconds_total", None) == 1.5
    assert _value(registry, "agent_accuracy_ratio", None) == 0.5
    assert _value(registry, "agent_weights_version", None) == 7
    assert _value(registry, "agent_finished", None) == 1
    assert math.isnan(_value(registry, "agent_temperature_celsius", None))
