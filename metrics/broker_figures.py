"""What the broker says of itself on its ``$SYS`` topics, as metrics.

Nothing here subscribes: whoever holds the connection does, to :data:`metrics.catalogue.BROKER_FIGURES`'
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

from metrics.catalogue import BROKER_FIGURES

_FIGURE: Final = re.compile(rb"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)(?: seconds)?\s*")


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
