"""What an operator sees of a running trainer: its scrape."""

from __future__ import annotations

import itertools
import logging
import queue
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker_config.embedded.broker import EmbeddedBroker, find_mosquitto
from broker_config.settings import BrokerSettings
from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Connected, Received, Transport, Will
from metrics.broker_figures import BROKER_FIGURES
from metrics.catalogue import total
from metrics.fleet_page.view import FleetView
from side_trainer.journal.journal import Journal
from side_trainer.receive.duties import Sparing
from side_trainer.receive.inbox import Inbox
from side_trainer.settings.schema import TrainerConfig
from side_trainer.trainer import Parts, connect_mqtt, run_trainer
from sidestream.contract.wire import pack
from sidestream.host.trace import Trace
from tests.trainer.conftest import config, devices
from tests.trainer.test_trainer import TOPICS, Listener, born, final, send
from tests.until import until


@contextmanager
def watched(broker: InProcessBroker | None, settings: TrainerConfig) -> Iterator[str]:
    """A running trainer; yields its metrics' URL, or its page's where it has one."""
    stop, urls = threading.Event(), queue.SimpleQueue[str]()

    def started(metrics_url: str, page_url: str) -> None:
        urls.put(page_url or metrics_url)

    def connect(config: TrainerConfig, client_id: str, will: Will) -> Transport:
        return broker.transport(client_id, will=will) if broker else connect_mqtt(config, client_id, will)

    thread = threading.Thread(
        target=run_trainer, args=(settings, stop), kwargs={"connect": connect, "started": started}
    )
    thread.start()
    try:
        yield urls.get(timeout=30)
    finally:
        stop.set()
        thread.join(30)


def scrape(url: str) -> dict[str, float]:
    """Every series, as Prometheus writes it."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        f"{sample.name}{{{','.join(f'{k}={v}' for k, v in sorted(sample.labels.items()))}}}": sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.slow
def test_the_brokers_own_figures_and_single_devices_are_in_the_scrape(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    with watched(broker, config(tmp_path, metrics_port=0)) as url:
        listener, fleet = Listener(broker.transport("watch")), devices()
        listener.transport.publish("$SYS/broker/publish/messages/dropped", b"12")
        listener.transport.publish("$SYS/broker/version", b"mosquitto version 2.0.11")
        plan = born(listener, fleet)
        send(listener, fleet[0], fleet[0].batch(plan))
        final(listener, 8)
        until(lambda: "sidestream_one_device_online{device=dev-2,tier=big}" in scrape(url), "devices")
        until(lambda: scrape(url).get("sidestream_broker_publishes_dropped_total{}") == 12, "the figure")


@pytest.mark.mosquitto
@pytest.mark.skipif(find_mosquitto() is None, reason="there is no mosquitto binary")
def test_a_real_mosquitto_has_every_one_of_the_figures(tmp_path: Path) -> None:
    with EmbeddedBroker(data_dir=tmp_path / "broker", kind="mosquitto") as broker:
        settings = config(tmp_path / "trainer", metrics_port=0, broker=BrokerSettings(url=broker.url))
        with watched(None, settings) as url:
            names = {f"{metric.name}{{}}" for metric in BROKER_FIGURES.values()}
            until(lambda: names <= scrape(url).keys(), "the broker has published them all")
            until(lambda: scrape(url)["sidestream_broker_clients_connected{}"] >= 1, "and goes on to")


@pytest.mark.slow
def test_a_device_whose_status_is_cleared_is_forgotten(broker: InProcessBroker, tmp_path: Path) -> None:
    with watched(broker, config(tmp_path, metrics_port=0)) as url:
        listener, fleet = Listener(broker.transport("watch")), devices()
        born(listener, fleet)
        until(lambda: scrape(url)["sidestream_devices_known{tier=big}"] == 2, "they are known")
        listener.transport.publish(TOPICS.status("big", fleet[0].name), b"", retain=True)
        until(lambda: scrape(url)["sidestream_devices_known{tier=big}"] == 1, "one is forgotten")


def test_messages_that_find_the_inbox_full_are_counted_in_the_metrics(
    broker: InProcessBroker, journal: Journal, tmp_path: Path
) -> None:
    parts = Parts(config(tmp_path), journal, Trace(), lambda *_: broker.transport("trainer"), False)
    inbox, metrics, seconds = Inbox(max_messages=2), parts.figures.metrics, itertools.count(1000, 10)
    ingest = parts.ingest(inbox, lambda connected: None, lambda: time.monotonic() + next(seconds))
    inbox.offer(Connected(epoch=1, protocol="5", max_packet_bytes=10**6, receive_maximum=64))
    ingest.step(0.0)
    assert parts.link.leads, "nobody else has answered for long"
    for _ in range(5):
        topic = TOPICS.activations("big", "dev-0")
        inbox.offer(Received(topic=topic, payload=b"x", retained=False, qos=1, epoch=1))
    ingest.step(0.0)
    assert (total(metrics.inbox_dropped), total(metrics.messages_rejected)) == (3, 2)


@pytest.mark.slow
def test_the_page_shows_the_running_trainer(broker: InProcessBroker, tmp_path: Path) -> None:
    with watched(broker, config(tmp_path, page=True, page_port=0)) as url:
        listener, fleet = Listener(broker.transport("watch")), devices()
        plan = born(listener, fleet)
        for device in fleet:
            send(listener, device, device.batch(plan))
        listener.transport.publish(TOPICS.activations("big", "dev-0"), b"rubbish")
        final(listener, 24)

        def view() -> FleetView:
            with urllib.request.urlopen(f"{url}api/fleet", timeout=10) as answer:
                return msgspec.json.decode(answer.read(), type=FleetView)

        def up_to_date() -> bool:
            trainer = view().trainer
            return trainer.samples == 24 and trainer.final and trainer.published == trainer.version

        until(up_to_date, "it is up to date")
        now = view()
    assert now.job == "colours" and [device.name for device in now.devices] == ["dev-0", "dev-1", "dev-2"]
    assert now.trainer.connected and now.trainer.messages == 4 and set(now.trainer.loss) == {"big", "small"}
    assert [(one.reason, one.count) for one in now.trainer.refused] == [("undecodable", 1)]
    assert now.refusals is not None and now.refusals[0].device == "dev-0"


@pytest.mark.slow
def test_labels_that_differ_only_in_case_or_spaces_are_told_of_with_their_devices(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    settings = config(tmp_path, page=True, page_port=0, labels=(), label_devices=3, label_wait_s=60.0)
    with watched(broker, settings) as url:
        listener = Listener(broker.transport("watch"))
        for device, labels in zip(devices(), (("on", "off"), ("On", "off"), ("ON", "off")), strict=True):
            topic = TOPICS.status(device.tier, device.name)
            listener.transport.publish(topic, pack(device.birth(labels=labels)), retain=True)

        def told() -> list[str]:
            with urllib.request.urlopen(f"{url}api/fleet", timeout=10) as answer:
                view = msgspec.json.decode(answer.read(), type=FleetView)
            return [one.words for one in view.events if one.kind == "labels"]

        until(lambda: len(told()) > 0, "it is told")
        until(lambda: len(told()) == 1 and "'on' (device dev-" in told()[0], "once, with both and devices")


def test_a_page_whose_port_is_taken_is_no_reason_not_to_train(
    broker: InProcessBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = config(tmp_path, page=True, page_port=port, metrics_port=0)
        with caplog.at_level(logging.WARNING, "side_trainer"), watched(broker, settings) as url:
            assert url.endswith("/metrics")
    assert f"port {port} is in use" in caplog.text


def test_what_takes_long_is_done_more_seldom_and_never_more_than_once_a_second() -> None:
    sparing, done = Sparing(), []
    for now in range(10):
        if sparing.due(float(now)):
            done.append(now)
            sparing.done(float(now), 0.001 if now < 3 else 0.4)
    assert done == [0, 1, 2, 3, 7]
