"""Connections over TLS: certificates are checked both ways, and large messages come through whole."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.connection.connection import Connection
from broker_config.embedded.broker import find_mosquitto
from broker_config.settings import BrokerSettings
from broker_config.transport import Received, packet_overhead_bytes
from tests.broker.conftest import Client, needs_mosquitto, quick
from tests.until import until

pytestmark = [
    pytest.mark.mosquitto,
    needs_mosquitto,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command"),
]

CONF = """
listener {port} 127.0.0.1
cafile {dir}/ca.crt
certfile {dir}/broker.crt
keyfile {dir}/broker.key
require_certificate true
use_identity_as_username true
allow_anonymous false
user root
"""


def openssl(*words: str, cwd: Path) -> None:
    subprocess.run(["openssl", *words], cwd=cwd, check=True, capture_output=True)


def authority(name: str, cwd: Path) -> None:
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")  # which Python 3.13 on insists on
    openssl(*new, *usage, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt", cwd=cwd)


def certificate(name: str, alternative: str, cwd: Path) -> None:
    keys = "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    (cwd / "ext").write_text(f"subjectAltName={alternative}\n{keys}")
    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}")
    openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", cwd=cwd)
    sign = ("x509", "-req", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
    openssl(*sign, "-in", f"{name}.csr", "-out", f"{name}.crt", "-extfile", "ext", cwd=cwd)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certs")
    authority("ca", path)
    authority("stranger", path)
    certificate("broker", "IP:127.0.0.1", path)
    certificate("device", "DNS:device", path)
    return path


@pytest.fixture(scope="module")
def tls_port(certs: Path) -> Iterator[int]:
    binary = find_mosquitto()
    assert binary is not None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    (certs / "conf").write_text(CONF.format(port=port, dir=certs))
    child = subprocess.Popen([binary, "-c", str(certs / "conf")], stderr=subprocess.DEVNULL)
    until(lambda: accepts(port))
    yield port
    child.terminate()
    child.wait()


def accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def connection(
    port: int, certs: Path, *, ca: str = "ca", host: str = "127.0.0.1", own: bool = True
) -> Connection:
    settings = BrokerSettings(
        url=f"mqtts://{host}:{port}",
        ca_file=str(certs / f"{ca}.crt"),
        cert_file=str(certs / "device.crt") if own else "",
        key_file=str(certs / "device.key") if own else "",
    )
    return Connection(settings, client_id="tls", backoff=quick())


def test_large_messages_come_through_tls_whole_and_in_order(certs: Path, tls_port: int) -> None:
    client = Client(connection(tls_port, certs), "tls", ["x"])
    largest = 272 * 1024 - packet_overhead_bytes("x")
    for number in range(20):
        client.transport.publish("x", bytes([number]) * (largest if number % 2 else 100))
    received = [event.payload for event in client.inbox.wait(Received, 20)]
    assert [(payload[0], len(payload)) for payload in received] == [
        (number, largest if number % 2 else 100) for number in range(20)
    ]
    client.transport.close()


def test_a_broker_signed_by_a_stranger_is_refused(certs: Path, tls_port: int) -> None:
    stranger = connection(tls_port, certs, ca="stranger")
    stranger.start(lambda _event: None)
    until(lambda: "broker.ca_file" in stranger.last_error)
    assert not stranger.connected
    stranger.close()


def test_a_broker_under_another_name_is_refused(certs: Path, tls_port: int) -> None:
    misnamed = connection(tls_port, certs, host="localhost")
    misnamed.start(lambda _event: None)
    until(lambda: "not trusted" in misnamed.last_error)
    misnamed.close()


def test_a_client_without_a_certificate_is_told_so_in_one_line(certs: Path, tls_port: int) -> None:
    nobody = connection(tls_port, certs, own=False)
    nobody.start(lambda _event: None)
    until(lambda: bool(nobody.last_error))
    assert not nobody.connected
    assert "\n" not in nobody.last_error
    nobody.close()


def test_plain_mqtt_to_a_tls_port_names_the_mistake(tls_port: int) -> None:
    settings = BrokerSettings(url=f"mqtt://127.0.0.1:{tls_port}")
    plain = Connection(settings, client_id="plain", backoff=quick())
    plain.start(lambda _event: None)
    until(lambda: "not its TLS port" in plain.last_error)
    plain.close()
