"""The fleet page: read-only, nothing from outside, and what it shows is what the board says."""

from __future__ import annotations

import gc
import gzip
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from html import unescape
from http.client import HTTPMessage
from pathlib import Path

import msgspec
import pytest

from metrics.fleet_page.board import Board
from metrics.fleet_page.server import PageServer, PortInUseError, serve_page
from metrics.fleet_page.view import AssignedView, FleetView, RefusalView, RefusedView, TrainerView
from sidestream.contract.errors import ConfigError
from tests.metrics.chromium import look, needs_chromium, picture
from tests.metrics.test_board import T0, Crowd

pytestmark = pytest.mark.slow

FILES = Path(__file__).parents[2] / "metrics" / "fleet_page" / "page"


def get(url: str, **headers: str) -> tuple[bytes, HTTPMessage]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return answer.read(), answer.headers


def status_of(url: str, method: str = "GET", **headers: str) -> int:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(
                url, method=method, headers=headers, data=b"x" if method == "POST" else None
            ),
            timeout=10,
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def crowd() -> Crowd:
    crowd = Crowd(12)
    crowd.update()
    return crowd


@pytest.fixture
def page(crowd: Crowd) -> Iterator[PageServer]:
    with serve_page(crowd.board, 0) as running:
        yield running


def test_the_page_and_its_files_are_served_under_a_strict_policy(page: PageServer) -> None:
    for name in ("", *(path.name for path in FILES.iterdir())):
        body, headers = get(page.url + name)
        assert body == (FILES / (name or "index.html")).read_bytes()
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Server"] is None


def test_nothing_comes_from_outside_and_no_script_or_style_is_inline() -> None:
    for path in FILES.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|innerHTML|eval\(|style=", text), path.name
    assert "<script>" not in (FILES / "index.html").read_text()


def test_it_can_only_be_read(page: PageServer) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert status_of(page.url, method) == status_of(f"{page.url}api/fleet", method) == 405
    assert status_of(page.url, "HEAD") == 200


@pytest.mark.parametrize("path", ["nowhere", "api", "../server.py", "%2e%2e/server.py", "api/fleet/x"])
def test_other_addresses_are_not_found(page: PageServer, path: str) -> None:
    assert status_of(page.url + path) == 404


def test_a_web_site_whose_name_points_here_is_told_nothing(page: PageServer) -> None:
    assert status_of(f"{page.url}api/fleet", Host="evil.example") == 421
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]", "[::1]:9465"):
        assert status_of(page.url, Host=host) == 200


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx",
    ],
)
def test_peers_that_begin_a_request_and_never_end_it_lose_their_places(crowd: Crowd, begun: bytes) -> None:
    with serve_page(crowd.board, 0, request_s=0.3) as page, ExitStack() as stack:
        address = ("127.0.0.1", int(page.url.rstrip("/").rpartition(":")[2]))
        peers = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(80)]
        for peer in peers:
            peer.sendall(begun)
        for peer in peers:
            _read_to_the_end(peer)
        assert status_of(page.url) == 200


def test_a_peer_that_says_a_byte_now_and_then_loses_its_place_too(crowd: Crowd) -> None:
    with serve_page(crowd.board, 0, request_s=0.3) as page:
        address = ("127.0.0.1", int(page.url.rstrip("/").rpartition(":")[2]))
        with socket.create_connection(address, timeout=0.02) as peer, suppress(ConnectionError):
            while True:
                peer.sendall(b"G")
                with suppress(TimeoutError):
                    if not peer.recv(1):
                        break


def _read_to_the_end(peer: socket.socket) -> None:
    with suppress(ConnectionResetError):
        while peer.recv(65536):
            continue


def test_figures_come_as_json_at_first_all_then_what_is_new(crowd: Crowd, page: PageServer) -> None:
    body, _ = get(f"{page.url}api/fleet")
    view = msgspec.json.decode(body, type=FleetView)
    assert view == crowd.board.view() and len(view.devices) == 12
    crowd.now = 1.0
    crowd.tell(4)
    crowd.update()
    body, _ = get(f"{page.url}api/fleet?board={view.board}&since={view.revision}")
    assert [device.name for device in msgspec.json.decode(body, type=FleetView).devices] == ["d4"]


@pytest.mark.parametrize("since", ["-1", "x", "9" * 400, "1.5", "%00", "²"])
def test_a_revision_that_is_none_gets_everything(page: PageServer, since: str) -> None:
    body, _ = get(f"{page.url}api/fleet?since={urllib.parse.quote(since)}")
    assert msgspec.json.decode(body, type=FleetView).whole


def test_large_answers_are_packed_for_who_takes_that(page: PageServer) -> None:
    plain, _ = get(f"{page.url}api/fleet")
    packed, headers = get(f"{page.url}api/fleet", **{"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip" and len(packed) < len(plain) / 2
    assert gzip.decompress(packed) == plain


def test_a_port_in_use_is_told_apart_from_a_wrong_setting(crowd: Crowd, page: PageServer) -> None:
    port = int(page.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(PortInUseError, match=f"page_port: port {port} is in use"):
        serve_page(crowd.board, port)
    with pytest.raises(ConfigError, match="page_host: cannot listen on"):
        serve_page(crowd.board, 0, "203.0.113.7")


@pytest.mark.slow
def test_closing_leaves_no_thread_no_socket_and_the_port_free(crowd: Crowd) -> None:
    before = threading.active_count()
    server = serve_page(crowd.board, 0)
    port = int(server.url.rstrip("/").rpartition(":")[2])
    get(server.url)
    with socket.create_connection(("127.0.0.1", port)):
        server.close()
        server.close()
    assert threading.active_count() == before
    with serve_page(crowd.board, port):
        pass
    del server
    gc.collect()


# --- in a browser ------------------------------------------------------------------------------------


def text_of(document: str, element: str) -> str:
    """What stands in the element with an id."""
    match = re.search(rf'id="{element}"[^>]*>(.*?)</(?:p|h1|h2|span|dd)>', document, re.DOTALL)
    assert match, element
    return " ".join(unescape(re.sub("<[^>]+>", "", match[1])).split())


def rows_of(document: str, table: str) -> list[list[str]]:
    """The cells of a table's body."""
    body = re.search(rf'<table id="{table}">.*?<tbody>(.*?)</tbody>', document, re.DOTALL)
    assert body, table
    rows = re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL)
    return [
        [unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
        for row in rows
    ]


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_the_fleet_its_curves_and_what_was_refused(crowd: Crowd) -> None:
    evil = "<img src=x onerror=alert(1)>"
    crowd.board.refuse(
        RefusalView(at_unix_s=T0, tier="big", device="d1", kind="activations", reason=f"nonfinite: {evil}")
    )
    crowd.status(3, "offline")
    for second in range(1, 6):
        crowd.now = float(second)
        crowd.tell(
            1, accuracy=0.9, probe_accuracy=0.8, samples_read=1300, samples_forwarded=1234, weights_version=2
        )
        crowd.tell(5, samples_read=12, samples_forwarded=6, samples_broken=6)
        crowd.update(
            TrainerView(
                connected=True,
                version=9,
                published=7,
                samples=100 * second,
                refused=(RefusedView(kind="activations", reason="nonfinite", count=41),),
                loss={"big": 1.5, "small": 0.5},
                passes=8.0,
                owed_rows=200 * second,
            )
        )
    with serve_page(crowd.board, 0) as page:
        document = look(page.url)
    assert text_of(document, "job") == "colours" and text_of(document, "state") == "learning"
    assert text_of(document, "t-devices") == "11 of 12" and text_of(document, "t-devices-sub") == "1 lost"
    assert text_of(document, "t-loss") == "1.000" and text_of(document, "t-samples").startswith("500")
    assert text_of(document, "t-quality-sub").endswith("; a linear probe has 0.800")
    devices = {row[0]: row for row in rows_of(document, "table")}
    well = [f"d{number}" for number in range(12) if number not in (1, 3, 5)]
    assert list(devices) == ["d3", "d1", "d5", *well], "the troubled first"
    assert devices["d5"][1:3] == [
        "online",
        "Data that cannot be used: not used of the 12 samples read: 6 unreadable (another encoding, no text, "
        "or too many fields: its log names the first lines)",
    ]
    assert text_of(document, "t-samples-sub").endswith("read not used: 6 unreadable")
    assert text_of(document, "t-left") == "2.0 of 8 passes"
    assert text_of(document, "t-left-sub") == "1,000 rows over the journal"
    assert devices["d1"][2] == f"Refused by the trainer: its activations are refused: nonfinite: {evil}"
    assert devices["d1"][1::2][:2] == ["online", "big"] and devices["d1"][5] == "1,234 of 1,300"
    assert devices["d1"][9:11] == ["2", "0.900"] and devices["d3"][1] == "lost"
    assert devices["d3"][2].startswith("Absent: its connection broke")
    assert "d1activations refused: nonfinite: " in re.sub("<[^>]+>", "", document)
    assert rows_of(document, "reasons") == [["nonfinite", "activations", "41"]]
    assert rows_of(document, "refusals")[0][3] == f"nonfinite: {evil}"
    assert evil not in document, "text from devices is text, never markup"
    assert document.count('class="line s') == 1 + 2 + 1 + 2, (
        "accuracy of the one tier that has a version, loss, …"
    )
    assert 'aria-label="Training loss: big 1.50, small 0.50"' in document


@needs_chromium
def test_a_devices_own_view_shows_what_was_chosen_for_it_and_why(crowd: Crowd) -> None:
    since = {"why": "memory is short", "since_unix_s": T0 - 120}
    crowd.assigned["big", "d1"] = AssignedView(words="batches of 8", advised="small", **since)  # type: ignore[arg-type]
    crowd.assigned["big", "d3"] = AssignedView(words="batches of 4", heeded=True, **since)  # type: ignore[arg-type]
    crowd.update()
    with serve_page(crowd.board, 0) as page:
        waiting, heeding, plain = (
            re.sub("<[^>]+>", "|", look(f"{page.url}#device={name}"))
            for name in ("big/d1", "big/d3", "big/d5")
        )
    assert "Chosen for it, not in use||batches of 8" in waiting
    assert "Because||memory is short, 2" in waiting and "Better in tier||small" in waiting
    assert "Chosen for it||batches of 4" in heeding and "Better in tier" not in heeding
    assert "Chosen for it" not in plain


class Counting(Board):
    """Notes what it was asked."""

    asked: list[int]

    def view(self, *, board: str = "", since: int = 0) -> FleetView:
        self.asked.append(since)
        return super().view(board=board, since=since)


@pytest.mark.slow
@needs_chromium
def test_five_hundred_devices_are_paged_filtered_sorted_and_asked_for_once() -> None:
    crowd = Crowd(0, most=600)
    crowd.board = Counting("colours", unix_s=T0)
    crowd.board.asked = []
    for number in range(500):
        crowd.status(number, "online")
        crowd.tell(number, samples_forwarded=number)
    crowd.update()
    with serve_page(crowd.board, 0) as page:
        document = look(f"{page.url}#sort=-samples&page=1")
        assert [row[0] for row in rows_of(document, "table")] == [f"d{n}" for n in range(449, 399, -1)]
        assert text_of(document, "p-page") == "Page 2 of 10"
        assert document.count('<i class="online" title=') == 500, "each has its dot"
        assert crowd.board.asked[0] == 0 and all(since > 0 for since in crowd.board.asked[1:])
        assert len(crowd.board.asked) > 1
        document = look(f"{page.url}#q=D49&tier=big")
        assert [row[0] for row in rows_of(document, "table")] == [
            "d49",
            "d491",
            "d493",
            "d495",
            "d497",
            "d499",
        ]
        assert text_of(document, "f-count") == "6 of 500 devices"


class Silent(Board):
    """Answers nothing after the first time."""

    asked = 0

    def view(self, *, board: str = "", since: int = 0) -> FleetView:
        self.asked += 1
        if self.asked > 1:
            raise RuntimeError("out of order")
        return super().view(board=board, since=since)


@pytest.mark.slow
@needs_chromium
def test_a_trainer_that_answers_no_more_is_told_and_what_it_said_last_stays() -> None:
    crowd = Crowd(3)
    crowd.board = Silent("colours", unix_s=T0)
    crowd.update()
    with serve_page(crowd.board, 0) as page:
        document = look(page.url, may_complain=True)
    assert "The trainer does not answer" in text_of(document, "notice")
    assert text_of(document, "state") == "no answer" and len(rows_of(document, "table")) == 3


@pytest.mark.slow
@needs_chromium
def test_it_is_drawn_in_light_and_in_dark(page: PageServer, tmp_path: Path) -> None:
    light = picture(page.url, tmp_path / "light.png", dark=False)
    dark = picture(page.url, tmp_path / "dark.png", dark=True)
    assert light.startswith(b"\x89PNG") and dark.startswith(b"\x89PNG") and light != dark
