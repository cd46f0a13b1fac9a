"""What the broker says of itself on its ``$SYS`` topics, as metrics.

Nothing here subscribes: whoever holds the connection does, to :data:`BROKER_FIGURES`'
topics, and hands over what arrives. A broker without such topics has no such series.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Final

from prometheus_client import Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from metrics.catalogue import Metric, counter, gauge

_FIGURE: Final = re.compile(rb"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)(?: seconds)?\s*")


BROKER_FIGURES: Final[dict[str, Metric]] = {
    f"$SYS/broker/{topic}": metric
    for topic, metric in {
        "clients/connected": gauge("broker_clients_connected", "Clients connected to the broker"),
        "messages/received": counter("broker_packets_received_total", "MQTT packets the broker received"),
        "messages/sent": counter("broker_packets_sent_total", "MQTT packets the broker sent"),
        "publish/messages/received": counter(
            "broker_publishes_received_total", "Messages published to the broker"
        ),
        "publish/messages/sent": counter("broker_publishes_sent_total", "Messages the broker sent on"),
        "publish/messages/dropped": counter(
            "broker_publishes_dropped_total", "Messages the broker dropped, acknowledged ones included"
        ),
        "bytes/received": counter("broker_received_bytes_total", "Bytes the broker received"),
        "bytes/sent": counter("broker_sent_bytes_total", "Bytes the broker sent"),
        "store/messages/count": gauge(
            "broker_stored_messages", "Messages the broker keeps: retained ones, and those that wait"
        ),
        "store/messages/bytes": gauge("broker_stored_bytes", "Their payload bytes"),
        "retained messages/count": gauge("broker_retained_messages", "Retained messages"),
        "subscriptions/count": gauge("broker_subscriptions", "Subscriptions of all clients"),
        "heap/current": gauge("broker_heap_bytes", "The broker's heap"),
        "uptime": gauge("broker_uptime_seconds", "Since the broker started"),
    }.items()
}
"""What a broker says of itself, by topic, where it does; these are Mosquitto's. No series until it has."""


class BrokerFigures(Collector):
    """The figures last heard. Take from one thread, collect from any."""

    def __init__(self) -> None:
        self._figures: dict[str, float] = {}

    def take(self, topic: str, payload: bytes) -> bool:
        """Note a figure; return False, and note nothing, if it is none or on another topic."""
        figure = read_figure(payload)
        if topic not in BROKER_FIGURES or figure is None:
            return False
        self._figures[topic] = figure
        return True

    def clear(self) -> None:
        """Forget them all: the broker is out of reach."""
        self._figures = {}

    def __getitem__(self, topic: str) -> float:
        """The figure on a topic; NaN if the broker has not told."""
        return self._figures.get(topic, math.nan)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        figures = dict(self._figures)
        for topic, metric in BROKER_FIGURES.items():
            if topic in figures:
                family = CounterMetricFamily if metric.type is Counter else GaugeMetricFamily
                yield family(metric.name, metric.help, value=figures[topic])


def read_figure(payload: bytes) -> float | None:
    """A number as brokers write it, ``12``, ``0.5`` or ``86 seconds``; None for anything else."""
    match = _FIGURE.fullmatch(payload)
    return float(match[1]) if match else None
