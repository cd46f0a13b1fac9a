"""Prometheus series of single devices: of so many and no more, those that have been known longest.

Read from the board when scraped, so a device that is forgotten leaves no series behind.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from metrics.catalogue import DEVICE_SERIES, DEVICES_UNLISTED
from metrics.fleet_page.board import Board


class DeviceSeries(Collector):
    """Collects from a board.

    Args:
        board: What is known.
        most: Of so many devices; 0 for none.
    """

    def __init__(self, board: Board, most: int) -> None:
        self._board = board
        self._most = most

    def collect(self) -> Iterator[GaugeMetricFamily]:
        devices, more = self._board.oldest(self._most)
        yield GaugeMetricFamily(DEVICES_UNLISTED.name, DEVICES_UNLISTED.help, value=more)
        if not self._most:
            return
        for field, metric in DEVICE_SERIES.items():
            family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            for device in devices:
                value = getattr(device, field)
                if value is not None:
                    family.add_metric((device.tier, device.name), float(value))
            yield family
