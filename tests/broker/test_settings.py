"""Broker settings: what is accepted, what is refused by name, and that secrets stay out of sight."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker_config.connection.tls import tls_context
from broker_config.settings import BrokerSettings, Endpoint, masked_url
from sidestream.contract.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mqtt://127.0.0.1", ("127.0.0.1", 1883, False, "", "")),
        ("mqtt://broker.local:1884/", ("broker.local", 1884, False, "", "")),
        ("mqtts://broker.example", ("broker.example", 8883, True, "", "")),
        ("MQTT://[::1]:2000", ("::1", 2000, False, "", "")),
        ("mqtt://me:s%40cret@host", ("host", 1883, False, "me", "s@cret")),
        ("mqtt://me@host", ("host", 1883, False, "me", "")),
        ("mqtt://me:a#b/c?d@e:f@host:1884", ("host", 1884, False, "me", "a#b/c?d@e:f")),
        ("mqtts://u/s?e#r:50%25@[fe80::1%eth0]", ("fe80::1%eth0", 8883, True, "u/s?e#r", "50%")),
        ("ws://host", ("host", 80, False, "", "")),
        ("wss://me:p@host:8084/mqtt", ("host", 8084, True, "me", "p")),
    ],
)
def test_urls_are_taken_apart(url: str, expected: tuple[Any, ...]) -> None:
    end = BrokerSettings(url=url).endpoint({})
    assert (end.host, end.port, end.tls, end.username, end.password) == expected


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"url": ""}, "broker.url"),
        ({"url": "127.0.0.1:1883"}, "broker.url"),
        ({"url": "http://host"}, "broker.url"),
        ({"url": "mqtt://"}, "broker.url"),
        ({"url": "mqtt://host:0"}, "broker.url"),
        ({"url": "mqtt://host:65536"}, "broker.url"),
        ({"url": "mqtt://host:port"}, "broker.url"),
        ({"url": "mqtt://host/a/+"}, "broker.topic_prefix"),
        ({"url": "mqtt://host/a//b"}, "broker.topic_prefix"),
        ({"topic_prefix": "$share/x"}, "broker.topic_prefix"),
        ({"url": "mqtt://host?x=1"}, "broker.url"),
        ({"url": "mqtt://host#x"}, "broker.url"),
        ({"url": "ws://host", "ca_file": "ca.pem"}, "broker.url"),
        ({"url": "mqtt://fe80::1:1883"}, "broker.url"),
        ({"url": "mqtt://[nonsense]"}, "broker.url"),
        ({"url": "mqtt://[::1]1883"}, "broker.url"),
        ({"url": "mqtt://ho st"}, "broker.url"),
        ({"url": "mqtt://a..b"}, "broker.url"),
        ({"url": "mqtt://[::1"}, "broker.url"),
        ({"ca_file": "ca.pem"}, "broker.url"),
        ({"url": "mqtts://host", "cert_file": "c.pem"}, "broker.key_file"),
        ({"url": "mqtts://host", "key_file": "k.pem"}, "broker.cert_file"),
        ({"password": "x"}, "broker.username"),
        ({"keepalive_s": 0}, "broker.keepalive_s"),
        ({"keepalive_s": 65536}, "broker.keepalive_s"),
        ({"max_packet_bytes": 10}, "broker.max_packet_bytes"),
        ({"connect_timeout_s": math.nan}, "broker.connect_timeout_s"),
        ({"connect_timeout_s": 0.0}, "broker.connect_timeout_s"),
        ({"protocol": "4"}, "broker.protocol"),
        ({"username": "x" * 65536}, "broker.username"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BrokerSettings(**changes).endpoint({})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert "\n" not in str(caught.value)


@given(st.text())
@example("mqtt://\ud800")
@example("mqtt://[fe80::1%25eth0]:1")
@example("mqtt://a:b@c:d@e")
@example("mqtt://℀.com")
def test_no_url_causes_anything_but_a_config_error(text: str) -> None:
    for url in (text, f"mqtt://{text}", f"mqtts://host:{text}", f"mqtt://{text}@host"):
        try:
            end = BrokerSettings(url=url).endpoint({})
        except ConfigError as error:
            assert error.field.startswith("broker.")
        else:
            assert end.host
            assert 1 <= end.port <= 65535


@pytest.mark.parametrize(
    ("settings", "path", "prefix"),
    [
        ({"url": "mqtt://host"}, "", ""),
        ({"url": "mqtts://host/tenants/17"}, "", "tenants/17"),
        ({"url": "mqtt://host/a%20b/"}, "", "a b"),
        ({"url": "mqtt://host/a", "topic_prefix": "/b/"}, "", "b"),
        ({"url": "ws://host"}, "/mqtt", ""),
        ({"url": "wss://host/some/where?x=1"}, "/some/where?x=1", ""),
        ({"url": "wss://host/ws", "topic_prefix": "t"}, "/ws", "t"),
    ],
)
def test_what_follows_the_host_is_a_prefix_of_topics_or_the_path_of_web_sockets(
    settings: dict[str, Any], path: str, prefix: str
) -> None:
    end = BrokerSettings(**settings).endpoint({})
    assert (end.web_path, end.topic_prefix) == (path, prefix)


def test_the_environment_overrides_the_file_and_the_file_the_url() -> None:
    settings = BrokerSettings(url="mqtt://u:p@host", username="v", password="q")
    environ = {"SIDESTREAM_BROKER_USERNAME": "w", "SIDESTREAM_BROKER_PASSWORD": "r"}
    assert _who(BrokerSettings(url="mqtt://u:p@host").endpoint({})) == ("u", "p")
    assert _who(settings.endpoint({})) == ("v", "q")
    assert _who(settings.endpoint(environ)) == ("w", "r")


def _who(end: Endpoint) -> tuple[str, str]:
    return end.username, end.password


def test_no_repr_and_no_error_shows_a_password() -> None:
    settings = BrokerSettings(url="mqtt://me:hunter2@host", username="me", password="hunter3")
    shown = [repr(settings), str(settings), repr(settings.endpoint({})), masked_url(settings.url)]
    with pytest.raises(ConfigError) as caught:
        BrokerSettings(url="http://me:hunter2@host").endpoint({})
    for text in [*shown, str(caught.value)]:
        assert "hunter" not in text
    assert "me:********@host" in shown[0]


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"ulr": "mqtt://host"}, BrokerSettings)


def test_an_unusable_certificate_file_is_refused_by_name(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    cases = {
        "broker.ca_file": BrokerSettings(ca_file=str(garbage)),
        "broker.cert_file": BrokerSettings(cert_file=str(garbage), key_file=str(garbage)),
        "broker.key_file": BrokerSettings(cert_file=str(garbage), key_file=str(tmp_path / "missing")),
    }
    for field, settings in cases.items():
        with pytest.raises(ConfigError) as caught:
            tls_context(settings)
        assert caught.value.field == field


def test_a_plain_tls_context_checks_the_broker() -> None:
    context = tls_context(BrokerSettings(url="mqtts://host"))
    assert context.check_hostname
