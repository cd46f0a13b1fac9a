"""Scrape config, rules, alerts and dashboard: promtool takes them, every alert fires and keeps quiet when it
should, and every query finds data in a Prometheus that scraped a running trainer."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

from broker_config.testing.inprocess import InProcessBroker
from metrics.broker_figures import BROKER_FIGURES
from metrics.catalogue import (
    AgentMetrics,
    TrainerMetrics,
)
from metrics.fleet_page.device_series import DEVICE_SERIES, DEVICES_UNLISTED
from metrics.shipping import FILES, render, shipped
from sidestream.contract.errors import ConfigError
from sidestream.contract.messages import Telemetry
from sidestream.contract.quality import tally_labels
from sidestream.contract.wire import pack
from tests.metrics.prometheus_process import Prometheus, needs_prometheus
from tests.trainer.conftest import config, devices
from tests.trainer.test_trainer import TOPICS, Listener, born, final, send
from tests.trainer.test_watching import watched

pytestmark = pytest.mark.slow

UNIT_TESTS = Path(__file__).with_name("alerts.test.yml")
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load(shipped("sidestream.alerts.yml"))["groups"]
    for rule in group["rules"]
}
RECORDED: dict[str, str] = {
    rule["record"]: rule["expr"]
    for group in yaml.safe_load(shipped("sidestream.rules.yml"))["groups"]
    for rule in group["rules"]
}
DASHBOARD: dict[str, Any] = json.loads(shipped("sidestream.dashboard.json"))
_NAME = re.compile(r"\b(?:instance\w*:)?sidestream_[a-z0-9_]+(?::\w+)?")


def panels() -> dict[str, str]:
    """Every query of the dashboard by panel and letter, with Grafana's variables filled in."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$__rate_interval", "1m")
        .replace("$instance", ".*")
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    }


def names_in(expression: str) -> set[str]:
    return set(_NAME.findall(expression))


# --- without a Prometheus ----------------------------------------------------------------------------


def test_every_name_in_rules_alerts_and_dashboard_is_in_the_catalogue() -> None:
    known = {
        metric.name
        for metric in (
            *TrainerMetrics.catalogue(),
            *AgentMetrics.catalogue(),
            *BROKER_FIGURES.values(),
            *DEVICE_SERIES.values(),
            DEVICES_UNLISTED,
        )
    } | set(RECORDED)
    alerts = (alert["expr"] for alert in ALERTS.values())
    for expression in (*RECORDED.values(), *alerts, *panels().values()):
        found = {name.removesuffix("_bucket") for name in names_in(expression)}
        assert found <= known, (expression, found - known)


def test_every_alert_has_a_severity_and_tells_what_is_wrong() -> None:
    for name, alert in ALERTS.items():
        assert name.startswith("Sidestream") and alert["labels"]["severity"] in ("warning", "critical")
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}


def test_every_alert_is_tested_both_ways() -> None:
    tests = [
        one
        for group in yaml.safe_load(UNIT_TESTS.read_text())["tests"]
        for one in group.get("alert_rule_test", ())
    ]
    for name in ALERTS:
        outcomes = {bool(one["exp_alerts"]) for one in tests if one["alertname"] == name}
        assert outcomes == {True, False}, name


def test_the_dashboard_fits_grafanas_grid_and_no_two_panels_share_a_number() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24 and panel["title"]


def test_the_files_are_rendered_for_the_trainers_named(tmp_path: Path) -> None:
    written = render(tmp_path / "new" / "folder", ["10.0.0.1:9464", "[::1]:9000", "trainer.local:1"])
    assert [path.name for path in written] == list(FILES)
    scraped = yaml.safe_load(written[0].read_text())["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped == ["10.0.0.1:9464", "[::1]:9000", "trainer.local:1"]


@pytest.mark.parametrize("target", ["", "host", "host:0", "host:99999", "http://host:1", 'x":1', "a b:1"])
def test_a_target_that_is_none_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--target"):
        render(tmp_path, [target])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out: cannot write to"):
        render(tmp_path / "file")


# --- with one ----------------------------------------------------------------------------------------


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_promtool_takes_the_config_and_the_rules(tmp_path: Path) -> None:
    render(tmp_path)
    promtool("check", "config", "--lint=all", "--lint-fatal", str(tmp_path / "prometheus.yml"))
    promtool("check", "rules", *(str(tmp_path / name) for name in FILES[1:3]))


@pytest.mark.slow
@needs_prometheus
def test_alerts_fire_when_they_should_and_keep_quiet_when_they_should() -> None:
    promtool("test", "rules", str(UNIT_TESTS))


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that scraped a trainer while a fleet learnt."""
    folder = tmp_path_factory.mktemp("scraped")
    settings = config(folder / "trainer", metrics_port=0)
    with InProcessBroker() as broker, watched(broker, settings) as url:
        target = url.removeprefix("http://").removesuffix("/metrics")
        with Prometheus(folder / "prometheus", target) as running:
            listener, fleet = Listener(broker.transport("watch")), devices()
            for topic in BROKER_FIGURES:
                listener.transport.publish(topic, b"1")
            running.await_result("sidestream_broker_uptime_seconds")  # rates want a scrape before it starts
            plan = born(listener, fleet)
            for device in fleet:
                told = Telemetry(stream=device.stream, accuracy=0.75, evaluation_samples=10)
                tally = tally_labels(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 2]), 4)
                told = msgspec.structs.replace(
                    told, temperature_celsius=50.0, outbox_max_bytes=100, tally=tally
                )
                listener.transport.publish(TOPICS.telemetry(device.tier, device.name), pack(told))
                send(listener, device, device.batch(plan))
            final(listener, 24)
            for done in ("sum(sidestream_samples_journaled_total) == 24", "sidestream_weights_version > 0"):
                running.await_result(done)
            running.await_result("instance:sidestream_samples_journaled:rate5m > 0")
            running.await_result("sum(rate(sidestream_update_seconds_count[1m])) > 0")
            yield running


@pytest.mark.slow
@needs_prometheus
@pytest.mark.parametrize("panel", list(panels()))
def test_every_query_of_the_dashboard_finds_figures(prometheus: Prometheus, panel: str) -> None:
    prometheus.await_figure(panels()[panel])


@pytest.mark.slow
@needs_prometheus
@pytest.mark.parametrize("record", list(RECORDED))
def test_every_recording_rule_records_figures(prometheus: Prometheus, record: str) -> None:
    prometheus.await_figure(record)


@needs_prometheus
@pytest.mark.parametrize("alert", list(ALERTS))
def test_every_alert_reads_series_that_are_there_and_none_fires_in_a_healthy_fleet(
    prometheus: Prometheus, alert: str
) -> None:
    for name in names_in(ALERTS[alert]["expr"]):
        prometheus.await_result(name)
    assert prometheus.query(f'ALERTS{{alertname="{alert}", alertstate="firing"}}') == []
