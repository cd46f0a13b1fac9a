"""A fleet's folder and its real broker."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.authority import Authority, Identity
from broker_config.connection.backoff import Backoff
from broker_config.connection.connection import Connection
from broker_config.embedded.broker import find_mosquitto
from broker_config.settings import BrokerSettings
from broker_config.transport import Connected, Event, ProtocolVersion, Received
from sidestream.fleet.folder import FleetFolder, create
from tests.until import until as until

JOB = "lights"
DEVICES = {"pi-1": "pi5", "pi-2": "pi5", "old-1": "pi4"}
OBSERVER = "@observer"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Guard:
    """A fleet's Mosquitto, with one observer more who may do everything."""

    def __init__(self, folder: FleetFolder) -> None:
        self.folder = folder
        self.identities: dict[str, Identity] = {}
        self.authority = Authority(
            Identity(
                (folder.path / "ca/ca.crt").read_bytes(),
                (folder.path / "ca/ca.key").read_bytes(),
            )
        )
        self.identities[OBSERVER] = self.authority.client(OBSERVER)
        self.identities["@trainer"] = Identity(
            (folder.path / "trainer/trainer.crt").read_bytes(),
            (folder.path / "trainer/trainer.key").read_bytes(),
        )
        for name, tier in DEVICES.items():
            enrolment = folder.add_device(name, tier)
            self.identities[name] = Identity(enrolment.certificate.encode(), enrolment.key.encode())
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        binary = find_mosquitto()
        assert binary is not None
        self.admit_observer()
        config = str(self.folder.path / "broker/mosquitto.conf")
        self._process = subprocess.Popen([binary, "-c", config], stderr=subprocess.DEVNULL)

        def accepts() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", self.folder.fleet.port)) == 0

        until(accepts, "the broker")

    def admit_observer(self) -> None:
        path = self.folder.path / "broker/acl"
        path.write_text(path.read_text() + f"\nuser {OBSERVER}\ntopic readwrite #\ntopic readwrite $SYS/#\n")

    def reload(self) -> None:
        self.admit_observer()
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)

    def settings(self, who: str, protocol: ProtocolVersion = "5") -> BrokerSettings:
        folder = self.folder.path / "clients" / who
        folder.mkdir(parents=True, exist_ok=True)
        identity = self.identities[who]
        (folder / "crt").write_bytes(identity.certificate)
        (folder / "key").write_bytes(identity.key)
        return BrokerSettings(
            url=f"mqtts://127.0.0.1:{self.folder.fleet.port}",
            ca_file=str(self.folder.path / "ca/ca.crt"),
            cert_file=str(folder / "crt"),
            key_file=str(folder / "key"),
            protocol=protocol,
        )


class Client:
    """Connected as somebody."""

    def __init__(self, guard: Guard, who: str, protocol: ProtocolVersion, *filters: str) -> None:
        self.received: list[Received] = []
        self._lock = threading.Lock()
        self.connection = Connection(
            guard.settings(who, protocol),
            client_id=f"test-{who}-{time.monotonic_ns()}",
            backoff=Backoff(first_s=0.02, cap_s=0.1),
        )
        for topic_filter in filters:
            self.connection.subscribe(topic_filter)
        self.up: list[Connected] = []
        self.connection.start(self._on_event)

    def _on_event(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Received):
                self.received.append(event)
            elif isinstance(event, Connected):
                self.up.append(event)

    def wait(self) -> Client:
        assert self.connection.wait_connected(20), self.connection.last_error
        return self

    def topics(self, payload: bytes) -> set[str]:
        with self._lock:
            return {event.topic for event in self.received if event.payload == payload}

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> FleetFolder:
    return create(
        tmp_path / "fleet", job=JOB, hosts=["127.0.0.1", "localhost"], port=free_port(), tiers=["pi5", "pi4"]
    )


@pytest.fixture
def guard(folder: FleetFolder) -> Iterator[Guard]:
    guard = Guard(folder)
    try:
        guard.start()
        yield guard
    finally:
        guard.stop()
