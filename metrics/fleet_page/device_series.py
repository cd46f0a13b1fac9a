"""Prometheus series of single devices: of so many and no more, those that have been known longest.

Read from the board when scraped, so a device that is forgotten leaves no series behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from metrics.catalogue import Metric, gauge
from metrics.fleet_page.board import Board

DEVICE_SERIES: Final[dict[str, Metric]] = {
    field: gauge(f"one_device_{name}", help, "tier", "device")
    for field, (name, help) in {
        "online": ("online", "1 while the device is there"),
        "heard_unix_s": ("heard_timestamp_seconds", "Unix time of the last message from the device"),
        "samples": ("samples", "Samples passed through its backbone for training, ever"),
        "samples_read": ("samples_read", "Samples it took from its source, ever"),
        "samples_unused": ("samples_unused", "Samples it read and can do nothing with, ever"),
        "bytes_up": ("sent_bytes", "Payload bytes it published, ever"),
        "outbox_bytes": ("outbox_bytes", "Bytes in its outbox"),
        "weights_version": ("weights_version", "Version in use on it"),
        "quality": ("quality", "Its figure of merit on held-out samples"),
    }.items()
}
"""Series of single devices, for as many devices as the trainer's setting ``metrics_devices`` allows."""

DEVICES_UNLISTED: Final[Metric] = gauge(
    "devices_unlisted", "Devices without series of their own, being more than metrics_devices"
)
"""How many that leaves out."""


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
