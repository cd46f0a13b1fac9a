"""Devices appear in Home Assistant by MQTT discovery, where the settings ask for it, and leave it again."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from broker_config.errors import NotConnected
from metrics.fleet_page.view import DeviceView, TroubleView
from side_trainer.broadcast.home_assistant import HomeAssistant
from sidestream.contract.topics import Topics

DEVICE = DeviceView(
    tier="pi4",
    name="kitchen.1",
    state="online",
    heard_unix_s=0.0,
    quality=0.875,
    temperature_celsius=51.5,
    weights_version=7,
    troubles=(TroubleView(kind="hot", title="Too hot", words="it is", severe=False, since_unix_s=0.0),),
)


class FakeLink:
    """Keeps what is retained."""

    active = True
    full = False

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.count = 0

    def publish(self, topic: str, payload: bytes, *, retain: bool, timeout_s: float) -> None:
        assert retain and timeout_s == 0.0
        if self.full:
            raise NotConnected("gone")
        self.count += 1
        self.retained[topic] = payload
        if not payload:
            del self.retained[topic]


def told(link: FakeLink, **settings: Any) -> HomeAssistant:
    return HomeAssistant(link, Topics("home"), "homeassistant", **settings)  # type: ignore[arg-type]


def test_each_device_is_described_with_state_accuracy_and_temperature() -> None:
    link = FakeLink()
    told(link, topic_prefix="tenants/17").tell([DEVICE], "accuracy", 0.0)
    ours = "sidestream_home_pi4_kitchen_1"
    state = "sidestream/v1/home/home/pi4/kitchen.1"
    names = ("state", "quality", "temperature")
    configs = {name: f"homeassistant/sensor/{ours}/{name}/config" for name in names}
    assert set(link.retained) == {*configs.values(), state}
    described = {name: json.loads(link.retained[topic]) for name, topic in configs.items()}
    assert {one["state_topic"] for one in described.values()} == {f"tenants/17/{state}"}
    assert len({one["unique_id"] for one in described.values()}) == 3
    assert described["quality"]["unit_of_measurement"] == "%" and described["quality"]["name"] == "Accuracy"
    assert described["temperature"]["device_class"] == "temperature"
    assert described["state"]["device"]["name"] == "kitchen.1"
    assert json.loads(link.retained[state]) == {
        "state": "online",
        "quality": 0.875,
        "temperature": 51.5,
        "version": 7,
        "samples": 0,
        "trouble": "Too hot: it is",
    }


def test_only_what_changes_is_told_and_the_state_now_and_then() -> None:
    link = FakeLink()
    home = told(link)
    home.tell([DEVICE], "accuracy", 0.0)
    home.tell([DEVICE], "accuracy", 60.0)
    assert link.count == 4
    home.tell([msgspec.structs.replace(DEVICE, state="lost")], "accuracy", 61.0)
    assert link.count == 5
    home.tell([msgspec.structs.replace(DEVICE, state="lost")], "accuracy", 200.0)
    assert link.count == 6


def test_a_device_that_is_forgotten_leaves() -> None:
    link = FakeLink()
    home = told(link)
    home.tell([DEVICE], "accuracy", 0.0)
    link.full = True
    home.tell([], "accuracy", 1.0)
    assert len(link.retained) == 4
    link.full = False
    home.tell([], "accuracy", 2.0)
    assert link.retained == {}


def test_a_large_fleet_is_told_bit_by_bit() -> None:
    link = FakeLink()
    home = told(link)
    fleet = [msgspec.structs.replace(DEVICE, name=f"d{number}") for number in range(50)]
    home.tell(fleet, "accuracy", 0.0)
    assert link.count == 20
    for second in range(1, 12):
        home.tell(fleet, "accuracy", float(second))
    assert len(link.retained) == 200


@pytest.mark.parametrize(("prefix", "active"), [("", True), ("homeassistant", False)])
def test_nothing_is_said_unless_it_is_asked_for_and_may_be(prefix: str, active: bool) -> None:
    link = FakeLink()
    link.active = active
    HomeAssistant(link, Topics("home"), prefix).tell([DEVICE], "accuracy", 0.0)  # type: ignore[arg-type]
    assert link.retained == {}


def test_a_measure_that_is_no_share_has_no_percentage() -> None:
    link = FakeLink()
    told(link).tell([DEVICE], "perplexity", 0.0)
    [quality] = [json.loads(payload) for topic, payload in link.retained.items() if "/quality/" in topic]
    assert "unit_of_measurement" not in quality and "* 100" not in quality["value_template"]
