"""The scrape endpoint: serves, says when it cannot, and goes without a trace."""

from __future__ import annotations

import gc
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from metrics.catalogue import TrainerMetrics
from metrics.server import REQUEST_S, serve
from sidestream.contract.errors import ConfigError
from tests.until import until


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    TrainerMetrics(registry).set_tiers(["pi"])
    return registry


def _get(url: str, host: str | None = None) -> str:
    request = urllib.request.Request(url, headers={} if host is None else {"Host": host})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text: str = answer.read().decode()
        return text


def test_a_scrape_parses_and_shows_the_registry(registry: CollectorRegistry) -> None:
    with serve(registry, 0) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/metrics"
        names = {family.name for family in text_string_to_metric_families(_get(server.url))}
    assert {"sidestream_messages_received", "sidestream_update_seconds", "sidestream_build_info"} <= names


def test_scrapes_at_the_same_time_are_all_answered(registry: CollectorRegistry) -> None:
    with serve(registry, 0) as server, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(_get, [server.url] * 16))
    assert all("sidestream_devices_online" in answer for answer in answers)


def test_a_busy_port_is_named(registry: CollectorRegistry) -> None:
    with serve(registry, 0) as server, pytest.raises(ConfigError) as failure:
        serve(registry, server.port)
    assert str(failure.value).startswith(f"metrics_port: port {server.port} is in use; ")
    assert failure.value.field == "metrics_port"


def test_a_port_somebody_else_holds_is_named_too(registry: CollectorRegistry) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="is in use"):
            serve(registry, other.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "port"),
    [("127.0.0.1", -1), ("127.0.0.1", 65536), ("203.0.113.7", 0), ("no host", 0), ("x" * 80 + ".example", 0)],
)
def test_what_cannot_be_listened_on_is_a_setting_to_correct(
    registry: CollectorRegistry, host: str, port: int
) -> None:
    with pytest.raises(ConfigError, match="metrics_port"):
        serve(registry, port, host)


def test_the_port_is_free_again_after_closing(registry: CollectorRegistry) -> None:
    with serve(registry, 0) as server:
        _get(server.url)
        port = server.port
    with serve(registry, port) as again:
        assert again.port == port


def test_closing_leaves_no_thread_and_no_socket(registry: CollectorRegistry) -> None:
    before = threading.active_count()
    server = serve(registry, 0)
    url = server.url
    _get(url)
    server.close()
    server.close()
    assert threading.active_count() == before
    with pytest.raises(urllib.error.URLError):
        _get(url)
    del server
    gc.collect()  # an open socket would be a ResourceWarning, and warnings are errors


def test_a_peer_that_says_nothing_holds_nobody_up(registry: CollectorRegistry) -> None:
    with serve(registry, 0) as server, socket.create_connection(("127.0.0.1", server.port)):
        assert "sidestream" in _get(server.url)


@pytest.mark.slow
def test_peers_that_never_end_their_request_lose_their_places(registry: CollectorRegistry) -> None:
    now = [0.0]
    with serve(registry, 0, clock=lambda: now[0]) as server, ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        peers = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(64)]
        for peer in peers:
            peer.sendall(b"GET /metrics HTTP/1.1\r\n")
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            while True:  # until all 64 have their places
                _get(server.url)
        now[0] = REQUEST_S + 1
        for peer in peers:
            with suppress(ConnectionResetError):
                assert peer.recv(1) == b""
        until(lambda: "sidestream" in _answer(server.url), "there is room again")


def _answer(url: str) -> str:
    try:
        return _get(url)
    except (urllib.error.URLError, ConnectionError):
        return ""


def test_a_web_site_whose_name_points_here_is_told_nothing(registry: CollectorRegistry) -> None:
    with serve(registry, 0) as server:
        for host in (
            "evil.example",
            "evil.example:9464",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "@",
            "",
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                _get(server.url, host)
            assert refused.value.code == 421
            assert b"sidestream" not in refused.value.read()
        for host in ("localhost", "LOCALHOST:9464", "127.0.0.1:1", "[::1]:9464"):
            assert "sidestream" in _get(server.url, host)


def test_on_an_address_of_the_network_it_answers_to_any_name(registry: CollectorRegistry) -> None:
    with serve(registry, 0, "0.0.0.0") as server:
        assert "sidestream" in _get(server.url, "trainer.example:9464")


def test_it_listens_where_it_is_told(registry: CollectorRegistry) -> None:
    with serve(registry, 0, "0.0.0.0") as server:
        assert server.url.startswith("http://127.0.0.1:")
        _get(server.url)
