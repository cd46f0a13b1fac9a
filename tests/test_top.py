"""sidestream top: the fleet in a terminal, from the trainer's page or past it from the broker."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from broker_config.connection.connection import Connection
from broker_config.embedded.broker import EmbeddedBroker
from broker_config.settings import BrokerSettings
from metrics.fleet_page.server import PageServer, serve_page
from metrics.fleet_page.view import RefusalView, TrainerView
from sidestream.cli import main
from sidestream.contract.messages import Rejection, Status, Telemetry, TrainerStatus
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack
from sidestream.top.screen import SORTS, plain, screen, spark
from sidestream.top.source import Picture
from tests.metrics.test_board import T0, Crowd


@pytest.fixture
def crowd() -> Crowd:
    crowd = Crowd(40)
    for second in range(3):
        crowd.now = float(second)
        crowd.tell(1, accuracy=0.5 + second / 10)
        trainer = TrainerView(
            connected=True, version=7, published=5, samples=40 * second, loss={"big": 2.0 - second}
        )
        crowd.update(trainer)
    return crowd


@pytest.fixture
def page(crowd: Crowd) -> Iterator[PageServer]:
    with serve_page(crowd.board, 0) as running:
        yield running


def drawn(picture: Picture, *, width: int, height: int | None, sort: int = 0, skip: int = 0) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(screen(picture, width=width, height=height, sort=sort, skip=skip))
    return capture.get().rstrip("\n").split("\n")


@pytest.mark.parametrize(("width", "height"), [(200, 60), (100, 24), (80, 24), (60, 14), (40, 10)])
def test_it_fits_the_terminal_whatever_its_size(crowd: Crowd, width: int, height: int) -> None:
    crowd.refuse(3)
    crowd.update()
    picture = Picture()
    picture.take(crowd.board.view())
    lines = drawn(picture, width=width, height=height)
    assert len(lines) <= height and max(map(len, lines)) <= width
    assert any(re.match(r"d\d+ ", line) for line in lines) and "sidestream top" in lines[0]


@pytest.mark.slow
def test_every_order_shows_every_device_and_scrolling_leaves_some_out(crowd: Crowd) -> None:
    picture = Picture()
    picture.take(crowd.board.view())
    for sort in range(len(SORTS)):
        lines = drawn(picture, width=160, height=None, sort=sort)
        assert sum(bool(re.match(r"d\d+ ", line)) for line in lines) == 40
    assert not any(line.startswith("d0 ") for line in drawn(picture, width=160, height=None, skip=25))


def test_views_put_together_are_the_whole_fleet_and_know_its_rate(crowd: Crowd) -> None:
    picture, first = Picture(), crowd.board.view()
    picture.take(first)
    assert picture.rate("samples") == 40.0
    crowd.now = 5.0
    crowd.tell(3, samples_forwarded=99)
    crowd.update(TrainerView(samples=300))
    picture.take(crowd.board.view(board=first.board, since=first.revision))
    assert len(picture.devices) == 40 and len(picture.points) == 4
    assert next(one for one in picture.devices if one.name == "d3").samples == 99


def test_what_is_read_and_not_used_stands_out_with_its_reason() -> None:
    crowd, picture = Crowd(3), Picture()
    crowd.tell(1, samples_read=12, samples_forwarded=6, samples_broken=6)
    crowd.tell(2, samples_read=7, samples_forwarded=7)
    crowd.update()
    picture.take(crowd.board.view())
    lines = drawn(picture, width=140, height=30)
    assert [line[:2] for line in lines if re.match(r"d\d+ ", line)] == ["d1", "d0", "d2"], (
        "the troubled first"
    )
    assert any(line.startswith("d1 ") and " 6/12 " in line for line in lines)
    assert any(line.startswith("d1 ") and line.endswith("data that cannot be used") for line in lines)
    assert "stuck: 1 device" in lines
    told = "  d1 (big): not used of the 12 samples read: 6 unreadable (another encoding, no text,"
    assert any(line.startswith(told) for line in lines)


def test_it_tells_the_same_reasons_as_the_page_and_what_is_left_to_learn() -> None:
    crowd, picture = Crowd(4), Picture()
    crowd.now = 20.0
    crowd.tell(2, samples_read=7, temperature_celsius=91.0, trouble="waits for\x1b[2J the plan")
    crowd.status(3, "offline")
    crowd.update(TrainerView(samples=100, passes=8.0, owed_rows=350, backlog=2))
    picture.take(crowd.board.view())
    lines = drawn(picture, width=160, height=30)
    at = lines.index("stuck: 2 devices")
    assert lines[at + 1].startswith("  d3 (big): its connection broke")
    assert [line.split(", since")[0] for line in lines[at + 2 : at + 4]] == [
        "  d2 (small): it is at 91 °C",
        "  d2 (small): waits for?[2J the plan",
    ]
    assert any(line.startswith("d2 ") and line.endswith("too hot, waits") for line in lines)
    assert "3.5 of 8 passes left, 2 records wait" in lines[1]
    crowd.update(TrainerView(samples=100, final=True))
    picture.take(crowd.board.view())
    assert "nothing left to learn" in drawn(picture, width=160, height=30)[1]


def test_a_figure_that_stays_is_drawn_in_the_middle() -> None:
    assert spark([1.0, 1.0, 1.0]) == "▄▄▄" and spark([0.0, 1.0]) == "▁█"


def test_what_devices_say_cannot_steer_the_terminal() -> None:
    crowd, picture = Crowd(1), Picture()
    evil = "\x1b]0;owned\x07\x1b[2J\r\n"
    crowd.board.refuse(RefusalView(at_unix_s=T0, tier="big", device=evil, kind=evil, reason=evil))
    crowd.update()
    picture.take(crowd.board.view())
    text = "\n".join(drawn(picture, width=120, height=30))
    assert "\x1b" not in text and "\x07" not in text and "?]0;owned?" in text


@given(st.text())
def test_plain_text_has_no_control_characters(text: str) -> None:
    assert all(char.isprintable() for char in plain(text)) and len(plain(text)) == len(text)


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=200))
def test_a_course_is_a_line_of_blocks(values: list[float | None]) -> None:
    line = spark(values)
    assert len(line) <= 24 and set(line) <= set("▁▂▃▄▅▆▇█")


@pytest.mark.slow
def test_once_prints_the_fleet_and_json_is_for_programs(
    page: PageServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--url", page.url, "--once"]) == 0
    out = capsys.readouterr().out
    assert "devices 40/40 online" in out and "\x1b" not in out
    assert main(["top", "--url", page.url, "--once", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["devices"]) == 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--url", "ftp://x"], "--url: 'ftp://x' is no address"),
        (["--url", "http://127.0.0.1:9", "--once"], "no fleet page at http://127.0.0.1:9/"),
        (["--broker", "mqtt://127.0.0.1:9"], "--job: is needed with --broker"),
        (["--job", "a/b"], "--job: 'a/b' cannot be part of a topic"),
        (["--json"], "--json: goes with --once"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"sidestream: error: {says}") and err.count("\n") == 1


def test_a_port_that_speaks_something_else_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            visitor, _ = server.accept()
            with visitor:
                visitor.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                visitor.recv(4096)

        greeter = threading.Thread(target=greet)
        greeter.start()
        assert main(["top", "--url", f"http://127.0.0.1:{server.getsockname()[1]}", "--once"]) == 1
        greeter.join()
    assert "no fleet page at" in capsys.readouterr().err


@pytest.mark.slow
def test_a_page_that_is_no_fleet_page_is_told(
    crowd: Crowd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_page(crowd.board, 0) as page:
        assert main(["top", "--url", f"{page.url}index.html", "--once"]) == 1
    assert "no fleet page at" in capsys.readouterr().err


@pytest.mark.embedded
def test_past_the_trainer_it_shows_what_is_on_the_broker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topics, stream = Topics("colours"), "a" * 32
    with EmbeddedBroker(data_dir=tmp_path, kind="amqtt") as broker:
        device = Connection(BrokerSettings(url=broker.url), client_id="device")
        device.start(lambda event: None)
        assert device.wait_connected(15)
        born = Status(state="online", birth=1, stream=stream)
        trainer = TrainerStatus(state="online", run=stream, epoch=1, version=12, samples=34)
        told = Telemetry(stream=stream, samples_forwarded=9, accuracy=0.25, evaluation_samples=4)
        refused = Rejection(kind="activations", reason="nonfinite: NaN", size_bytes=3)
        device.publish(topics.status("pi", "dev-a"), pack(born), retain=True)
        device.publish(topics.trainer_status, pack(trainer), retain=True)
        device.publish(topics.telemetry("pi", "dev-a"), pack(told), retain=True)
        device.publish(topics.rejected("pi", "dev-a"), pack(refused), retain=True)
        assert device.flush(10)
        assert main(["top", "--broker", broker.url, "--job", "colours", "--once"]) == 0
        device.close()
    out = capsys.readouterr().out
    assert re.search(r"dev-a +pi +online", out) and "accuracy 0.250" in out
    assert "version 12" in out and "samples 34" in out and "dev-a (pi), activations: nonfinite: NaN" in out


_OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """sidestream top in a terminal of its own, whose Ctrl-C reaches it."""

    def __init__(self, url: str) -> None:
        self._file, theirs = pty.openpty()
        self.resize(120, 30)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _OWN_TERMINAL,
                sys.executable,
                "-m",
                "sidestream.cli",
                "top",
                "--url",
                url,
            ],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, key: str) -> None:
        os.write(self._file, key.encode())

    def await_text(self, text: str) -> None:
        self.shown, deadline_s = "", time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < deadline_s, self.shown[-3000:]
            if select.select([self._file], [], [], 0.1)[0]:
                self.shown += os.read(self._file, 65536).decode(errors="replace")

    def code(self) -> int:
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            if select.select([self._file], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._file, 65536).decode(errors="replace")
                except OSError:
                    break
        os.close(self._file)
        return self._process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["q", "\x03"])
def test_in_a_terminal_it_sorts_follows_the_size_and_leaves_on_a_key(page: PageServer, key: str) -> None:
    terminal = Terminal(page.url)
    terminal.await_text("s sort: trouble")
    terminal.press("s")
    terminal.await_text("s sort: device")
    terminal.resize(60, 12)
    terminal.await_text("sidestream top")
    terminal.press(key)
    assert terminal.code() == 0
    assert "\x1b[?1049l" in terminal.shown, "the screen before is back"


@pytest.mark.slow
def test_without_a_terminal_it_points_to_once(page: PageServer) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sidestream.cli", "top", "--url", page.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "--once" in done.stderr
