"""The embedded broker: what it chose and why, how it fails, and that it never outlives its parent."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from broker_config.embedded import broker as embedded
from broker_config.embedded.broker import EmbeddedBroker
from broker_config.embedded.probe import answers_mqtt
from sidestream.contract.errors import BrokerError
from tests.broker.conftest import PATIENCE_S, needs_mosquitto
from tests.until import until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.embedded


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_it_answers_while_it_runs_and_not_after(own_broker: EmbeddedBroker) -> None:
    with own_broker as broker:
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        assert answers_mqtt("127.0.0.1", broker.port, 1.0)
        pid = broker.pid
        assert alive(pid)
    assert not alive(pid)
    assert not answers_mqtt("127.0.0.1", broker.port, 1.0)
    broker.stop()


def test_it_listens_on_its_host_only(own_broker: EmbeddedBroker) -> None:
    own_broker.host = "127.0.0.2"
    with own_broker as broker:
        assert answers_mqtt("127.0.0.2", broker.port, 1.0)
        assert not answers_mqtt("127.0.0.1", broker.port, 1.0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_it_listens_on_ipv6_too(own_broker: EmbeddedBroker) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback here")
    own_broker.host = "::1"
    with own_broker as broker:
        assert broker.url == f"mqtt://[::1]:{broker.port}"


def test_it_restarts_on_the_same_port(own_broker: EmbeddedBroker) -> None:
    with own_broker as broker:
        port, pid = broker.port, broker.pid
        broker.stop()
        broker.start()
        broker.wait_ready()
        assert broker.port == port
        assert broker.pid != pid


def test_its_own_death_is_noticed_and_told(own_broker: EmbeddedBroker) -> None:
    with own_broker as broker:
        os.kill(broker.pid, signal.SIGKILL)
        until(lambda: not broker.running)
        with pytest.raises(BrokerError, match=f"the embedded broker .{broker.kind}. has stopped"):
            broker.check_alive()
        broker.start()
        broker.wait_ready()


def test_sigterm_ends_the_child_cleanly(own_broker: EmbeddedBroker) -> None:
    with own_broker as broker:
        assert broker._child is not None
        broker._child.send_signal(signal.SIGTERM)
        assert broker._child.wait(PATIENCE_S) == 0


PARENT = """
import signal, sys
from pathlib import Path
from broker_config.embedded.broker import EmbeddedBroker
broker = EmbeddedBroker(data_dir=Path(sys.argv[1]), kind=sys.argv[2])
broker.__enter__()
print(broker.pid, broker._child.pid, flush=True)
signal.pause()
"""


def run_parent(broker: EmbeddedBroker) -> tuple["subprocess.Popen[str]", int, int]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(broker.data_dir), broker.kind],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert parent.stdout is not None
    pid, child = map(int, parent.stdout.readline().split())
    parent.stdout.close()
    return parent, pid, child


def test_it_does_not_outlive_a_parent_killed_with_sigkill(own_broker: EmbeddedBroker) -> None:
    parent, pid, child = run_parent(own_broker)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until(lambda: not alive(pid) and not alive(child), timeout_s=2.0)


def test_it_does_not_outlive_its_guardian_either(own_broker: EmbeddedBroker) -> None:
    with own_broker as broker:
        assert broker._child is not None
        pid = broker.pid
        os.kill(broker._child.pid, signal.SIGKILL)
        until(lambda: not alive(pid), timeout_s=2.0)


def test_it_outlives_the_thread_that_started_it(own_broker: EmbeddedBroker) -> None:
    thread = threading.Thread(target=own_broker.start)
    thread.start()
    thread.join()
    try:
        own_broker.wait_ready()
        assert alive(own_broker.pid)
    finally:
        own_broker.stop()


def test_a_busy_port_is_named_with_the_way_out(own_broker: EmbeddedBroker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        own_broker.port = taken.getsockname()[1]
        with pytest.raises(BrokerError) as caught, own_broker:
            pass
    assert str(caught.value) == (
        f"port {own_broker.port} is in use; choose another with --port, or --port 0 for a free one"
    )


@pytest.mark.parametrize(
    ("host", "port"), [("192.0.2.1", 0), ("no-such-host.invalid", 0), ("127.0.0.1", 70000)]
)
def test_an_impossible_address_is_refused_in_one_line(tmp_path: Path, host: str, port: int) -> None:
    with pytest.raises(BrokerError) as caught:
        EmbeddedBroker(data_dir=tmp_path, host=host, port=port, kind="amqtt").start()
    assert "choose" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unusable_data_directory_is_named(own_broker: EmbeddedBroker, tmp_path: Path) -> None:
    own_broker.data_dir = tmp_path / "file" / "data"
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(BrokerError, match=r"cannot use the data directory .* --data-dir"):
        own_broker.start()


def test_two_brokers_do_not_share_a_data_directory(own_broker: EmbeddedBroker) -> None:
    with own_broker as broker:
        second = EmbeddedBroker(data_dir=broker.data_dir, kind=broker.kind)
        with pytest.raises(BrokerError, match="another broker is using"):
            second.start()


def test_a_broker_that_cannot_start_shows_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "mosquitto"
    bad.write_text(
        "#!/bin/sh\n[ \"$1\" = -h ] && echo 'mosquitto version 9' || echo 'no luck today' >&2\nexit 3\n"
    )
    bad.chmod(0o755)
    monkeypatch.setattr(embedded, "find_mosquitto", lambda: str(bad))
    with (
        pytest.raises(BrokerError, match="has stopped; its log ends: no luck today"),
        EmbeddedBroker(data_dir=tmp_path / "data"),
    ):
        pass


def test_it_says_what_it_chose_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_mosquitto", lambda: None)
    fallback = EmbeddedBroker(data_dir=tmp_path)
    assert (fallback.kind, fallback.why) == (
        "amqtt",
        "no mosquitto binary on PATH or in /usr/sbin; using the built-in amqtt (MQTT 3.1.1)",
    )
    with pytest.raises(BrokerError, match="install it, or use --kind amqtt"):
        EmbeddedBroker(data_dir=tmp_path, kind="mosquitto")
    exposed = EmbeddedBroker(data_dir=tmp_path, host="0.0.0.0")
    assert "WARNING: no passwords on 0.0.0.0" in exposed.why
    assert "127.0.0.1" in exposed.url


@pytest.mark.mosquitto
@needs_mosquitto
def test_mosquitto_is_chosen_where_it_is_installed(tmp_path: Path) -> None:
    broker = EmbeddedBroker(data_dir=tmp_path)
    assert broker.kind == "mosquitto"
    assert "mosquitto" in broker.why
    assert " found at /" in broker.why


def test_a_packet_over_the_limit_costs_its_sender_the_connection(amqtt: EmbeddedBroker) -> None:
    with socket.create_connection(("127.0.0.1", amqtt.port), PATIENCE_S) as sock:
        sock.sendall(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x0a\x00\x01x")
        assert sock.recv(4) == b"\x20\x02\x00\x00"
        sock.sendall(b"\x30\xff\xff\xff\x7f\x00\x01x")
        assert sock.recv(1) == b""
    assert answers_mqtt("127.0.0.1", amqtt.port, 1.0)


def test_something_that_is_not_mqtt_is_hung_up_on(amqtt: EmbeddedBroker) -> None:
    with socket.create_connection(("127.0.0.1", amqtt.port), PATIENCE_S) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sock.recv(1) == b""
    assert answers_mqtt("127.0.0.1", amqtt.port, 1.0)
