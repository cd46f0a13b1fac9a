"""mosquitto.conf, as rendered, starts a real Mosquitto and says what it must."""

import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.embedded.broker import find_mosquitto
from broker_config.embedded.probe import answers_mqtt
from broker_config.mosquitto import is_loopback, render_deployment, render_embedded
from metrics.fleet_page.fleet import MAX_DEVICES
from sidestream.contract.errors import BrokerError
from tests.broker.conftest import needs_mosquitto
from tests.until import until


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A directory that Mosquitto can use once it has changed from root to its own user."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def settings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_only_the_loopback_listener_is_open_and_the_fleets_is_prepared(tmp_path: Path) -> None:
    (path,) = render_deployment(tmp_path / "made" / "for" / "us")
    text = path.read_text()
    assert [line for line in settings(text) if line.startswith("listener")] == ["listener 1883 127.0.0.1"]
    for prepared in ("# listener 8883", "# require_certificate true", "# acl_file ", "# password_file "):
        assert prepared in text


def test_every_setting_has_its_reason_above_it(tmp_path: Path) -> None:
    (path,) = render_deployment(tmp_path)
    paragraphs = path.read_text().split("\n\n")
    for paragraph in paragraphs:
        assert paragraph.lstrip().startswith("#"), paragraph


@pytest.mark.parametrize(
    "needed",
    [
        "set_tcp_nodelay true",
        "persistence true",
        "autosave_interval 30",
        "max_packet_size ",
        "max_queued_bytes ",
    ],
)
def test_both_renderings_hold_what_the_project_needs(tmp_path: Path, needed: str) -> None:
    (path,) = render_deployment(tmp_path)
    for text in (path.read_text(), render_embedded("127.0.0.1", 1883, tmp_path)):
        assert any(line.startswith(needed) for line in settings(text))


def test_the_births_of_all_devices_in_view_find_room_when_a_trainer_starts(tmp_path: Path) -> None:
    (path,) = render_deployment(tmp_path)
    for text in (path.read_text(), render_embedded("127.0.0.1", 1883, tmp_path)):
        (room,) = (line.split()[1] for line in settings(text) if line.startswith("max_queued_messages "))
        assert int(room) >= 2 * MAX_DEVICES


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BrokerError, match="choose another directory with --out"):
        render_deployment(tmp_path / "file")


@pytest.mark.mosquitto
@needs_mosquitto
def test_the_deployment_starts_a_real_mosquitto(public_dir: Path) -> None:
    binary = find_mosquitto()
    assert binary is not None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    (path,) = render_deployment(public_dir, port=port, data_dir=str(public_dir))
    with (public_dir / "log").open("w") as log:
        child = subprocess.Popen([binary, "-c", str(path)], stderr=log)
    try:
        until(lambda: answers_mqtt("127.0.0.1", port, 1.0) or child.poll() is not None)
        assert child.poll() is None, (public_dir / "log").read_text()
    finally:
        child.terminate()
        child.wait()
    assert "Error" not in (public_dir / "log").read_text()


def test_loopback_is_recognised() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.5", "broker.local", ""]))
