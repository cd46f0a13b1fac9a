"""Devices for Home Assistant: each appears there by MQTT discovery, with state, accuracy and temperature.

What is retained for it: three descriptions a device below ``<prefix>/sensor``, and below the job's own topics
a small JSON object that they read. Off unless the settings name a prefix.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from metrics.fleet_page.view import DeviceView
from side_trainer.broadcast.leader_transport import LeaderTransport
from sidestream.contract.errors import BrokerError
from sidestream.contract.topics import Topics

_AT_ONCE: Final = 20  # messages a second at most: devices and receipts come first
_AGAIN_S: Final = 120.0
_EXPIRES_S: Final = 600
_log = logging.getLogger(__name__)


class HomeAssistant:
    """Belongs to the ingest thread.

    Args:
        link: Where to.
        topics: The job's.
        prefix: Where Home Assistant looks for descriptions; empty: nothing is said.
        topic_prefix: What the broker has before our topics, which descriptions have to name.
    """

    def __init__(self, link: LeaderTransport, topics: Topics, prefix: str, topic_prefix: str = "") -> None:
        self._link = link
        self._topics = topics
        self._prefix = prefix
        self._before = f"{topic_prefix}/" if topic_prefix else ""
        self._told: dict[str, tuple[bytes, float]] = {}
        self._devices: dict[tuple[str, str], list[str]] = {}

    def tell(self, devices: Iterable[DeviceView], measure: str, now: float) -> None:
        """Publish what has changed of the fleet, as far as there is room; and what is due again."""
        if not self._prefix or not self._link.active:
            return
        left, here = _AT_ONCE, set[tuple[str, str]]()
        for device in devices:
            here.add((device.tier, device.name))
            messages = list(self._messages(device, measure))
            self._devices[device.tier, device.name] = [topic for topic, _ in messages]
            for topic, payload in messages:
                if left and self._is_news(topic, payload, now) and self._publish(topic, payload, now):
                    left -= 1
        for gone in self._devices.keys() - here:
            for topic in self._devices[gone]:
                if topic in self._told and self._publish(topic, b"", now):
                    del self._told[topic]
            if not any(topic in self._told for topic in self._devices[gone]):
                del self._devices[gone]

    def _messages(self, device: DeviceView, measure: str) -> Iterator[tuple[str, bytes]]:
        """Topic and payload of all that stands about a device."""
        topic = self._topics.home(device.tier, device.name)
        ours = re.sub(r"[^a-zA-Z0-9_-]", "_", f"sidestream_{self._topics.job}_{device.tier}_{device.name}")
        about = {
            "identifiers": [ours],
            "name": device.name,
            "manufacturer": "Sidestream",
            "model": f"{self._topics.job}, tier {device.tier}",
            "sw_version": device.software,
        }
        for what, more in _sensors(measure).items():
            described = {
                "unique_id": f"{ours}_{what}",
                "state_topic": f"{self._before}{topic}",
                "json_attributes_topic": f"{self._before}{topic}",
                "expire_after": _EXPIRES_S,
                "device": about,
                **more,
            }
            yield f"{self._prefix}/sensor/{ours}/{what}/config", _packed(described)
        state = {
            "state": device.state,
            "quality": device.quality,
            "temperature": device.temperature_celsius,
            "version": device.weights_version,
            "samples": device.samples,
            "trouble": "; ".join(f"{one.title}: {one.words}" for one in device.troubles) or "none",
        }
        yield topic, _packed(state)

    def _is_news(self, topic: str, payload: bytes, now: float) -> bool:
        before, at = self._told.get(topic, (b"", float("-inf")))
        return before != payload or (not topic.endswith("/config") and now - at > _AGAIN_S)

    def _publish(self, topic: str, payload: bytes, now: float) -> bool:
        try:
            self._link.publish(topic, payload, retain=True, timeout_s=0.0)
        except BrokerError as exc:
            _log.debug("not sent to %s: %s", topic, exc)
            return False
        self._told[topic] = payload, now
        return True


def _sensors(measure: str) -> dict[str, dict[str, Any]]:
    """By name, what is special of each."""
    share = measure in ("accuracy", "micro_f1")
    value = "value_json.quality * 100" if share else "value_json.quality"
    quality: dict[str, Any] = {
        "name": measure.replace("_", " ").capitalize(),
        "value_template": f"{{{{ ({value}) | round(1) if value_json.quality is not none else none }}}}",
        "state_class": "measurement",
    }
    if share:
        quality["unit_of_measurement"] = "%"
    return {
        "state": {"name": "State", "value_template": "{{ value_json.state }}", "icon": "mdi:chip"},
        "quality": quality,
        "temperature": {
            "name": "Temperature",
            "value_template": "{{ value_json.temperature }}",
            "device_class": "temperature",
            "unit_of_measurement": "°C",
            "state_class": "measurement",
        },
    }


def _packed(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
