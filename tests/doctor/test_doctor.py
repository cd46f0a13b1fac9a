"""``sidestream doctor``: every failure that it claims to find is made to happen, and found."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from broker_config.authority import LEAF_DAYS, Authority
from broker_config.connection.connection import Connection
from broker_config.embedded.broker import find_mosquitto
from broker_config.settings import BrokerSettings
from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Event, ProtocolVersion, Transport
from edge_agent.config import DataConfig
from sidestream.cli import main
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.tasks import Task
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack
from sidestream.doctor.broker import VERSION_TOPIC, Visit, examine
from sidestream.doctor.cli import Patient, look_at
from sidestream.doctor.data import check_data
from sidestream.doctor.finding import Finding
from sidestream.doctor.machine import check_backbone, check_memory, check_state, check_torch
from tests.agent.tiny import save_tiny
from tests.broker.conftest import needs_mosquitto
from tests.fleet.conftest import JOB, Guard, folder, free_port, guard
from tests.until import PATIENCE_S, until

__all__ = ["folder", "guard"]
DAY_S = 86400.0
TOPICS = Topics(JOB)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {one.check: one for one in findings}


def patient(guard: Guard, tmp_path: Path, protocol: ProtocolVersion = "5", tier: str = "pi5") -> Patient:
    return Patient(
        broker=guard.settings("pi-1", protocol),
        job=JOB,
        tier=tier,
        device="pi-1",
        backbone=str(tmp_path / "none"),
        quick=True,
        state_dir=tmp_path / "state",
        disk_mib=1,
    )


def visit(
    connect: Callable[[str], Transport], tmp_path: Path, *, host: str = "127.0.0.1", answer_s: float = 20.0
) -> Visit:
    return Visit(
        connect=connect,
        echo=TOPICS.echo("pi5", "pi-1"),
        foreign=TOPICS.echo("pi5", "pi-2"),
        plan=TOPICS.plan,
        host=host,
        port=1883,
        state_dir=tmp_path / "state",
        patience_s=20.0,
        answer_s=answer_s,
    )


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "bert")


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))


class Mosquitto:
    """One with settings of the test's own."""

    def __init__(self, folder: Path, *lines: str) -> None:
        binary = find_mosquitto()
        assert binary is not None
        self.port = free_port()
        self._command = [binary, "-c", str(folder / "conf")]
        text = [f"listener {self.port} 127.0.0.1", "allow_anonymous true", "user root", *lines]
        (folder / "conf").write_text("\n".join(text) + "\n")
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def connect(self, protocol: ProtocolVersion = "5") -> Callable[[str], Transport]:
        settings = BrokerSettings(url=f"mqtt://127.0.0.1:{self.port}", protocol=protocol)
        return lambda client_id: Connection(settings, client_id=client_id)


@pytest.mark.mosquitto
@needs_mosquitto
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_healthy_device_of_a_fleet_has_nothing_wrong(
    guard: Guard, tmp_path: Path, tiny: Path, protocol: ProtocolVersion
) -> None:
    healthy = msgspec.structs.replace(
        patient(guard, tmp_path, protocol), backbone=str(tiny), quick=protocol == "3.1.1"
    )
    found = by_name(look_at(healthy))
    assert {name: one.state for name, one in found.items() if one.state in ("failed", "warning")} == {}
    assert found["access"].state == found["retained"].state == found["bandwidth"].state == "ok"
    assert found["certificate of the broker"].state == "ok"
    if not healthy.quick:
        assert found["torch"].said.startswith("version") and "fingerprint" in found["backbone"].said
    again = msgspec.structs.replace(healthy, quick=True)
    assert by_name(look_at(again))["persistence"].state == "ok"


@pytest.mark.mosquitto
@needs_mosquitto
def test_the_command_prints_lines_or_json_and_its_code_tells(
    guard: Guard, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = guard.settings("pi-1")
    file = tmp_path / "agent.toml"
    broker = "".join(
        f'{name} = "{getattr(settings, name)}"\n' for name in ("url", "ca_file", "cert_file", "key_file")
    )
    about = f'job = "{JOB}"\ndevice = "pi-1"\ntier = "pi5"\nstate_dir = "{tmp_path / "s"}"\n'
    file.write_text(f'{about}backbone = "{tiny}"\noutbox_max_mib = 1\n[broker]\n{broker}')
    assert main(["doctor", str(file), "--quick"]) == 0
    assert "ok  round trip" in capsys.readouterr().out
    file.write_text(f'{about}backbone = "/none"\noutbox_max_mib = 1\n[broker]\n{broker}')
    assert main(["doctor", str(file), "--json"]) == 1
    found = {one["check"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["backbone"]["state"] == "failed" and found["backbone"]["remedy"]
    trainer = str(guard.folder.path / "trainer/trainer.toml")
    assert main(["doctor", trainer, "--quick"]) == main(["doctor", "--trainer", trainer, "--quick"]) == 0
    assert main(["doctor"]) == 1 and main(["doctor", str(file), "--trainer", trainer]) == 1


def test_a_broker_that_cannot_be_reached_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--broker", f"mqtt://127.0.0.1:{free_port()}"]) == 1
    assert "is the broker running?" in capsys.readouterr().out


def test_a_connection_that_is_up_before_it_says_so_is_waited_for(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    def late(client_id: str) -> Transport:
        transport = broker.transport(client_id)
        start, up = transport.start, threading.Event()

        def start_late(on_event: Callable[[Event], None]) -> None:
            def after_the_start(event: Event) -> None:
                assert up.wait(PATIENCE_S)
                on_event(event)

            start(after_the_start)
            assert transport.wait_connected(PATIENCE_S)
            up.set()

        transport.start = start_late  # type: ignore[method-assign]
        return transport

    found, _ = examine(visit(late, tmp_path))
    assert by_name(found)["broker"].state == "ok"


def test_an_old_broker_fails(broker: InProcessBroker, tmp_path: Path) -> None:
    teller = broker.transport("teller")
    teller.start(lambda _event: None)
    assert teller.wait_connected(20)
    for version, state in (("mosquitto version 1.6.9", "failed"), ("mosquitto version 2.0.11", "ok")):
        teller.publish(VERSION_TOPIC, version.encode(), retain=True)
        found, _ = examine(visit(broker.transport, tmp_path))
        assert by_name(found)["version"].state == state
    teller.close()


@pytest.mark.parametrize(("limit", "state"), [(131_072, "warning"), (16_384, "failed"), (278_528, "ok")])
def test_a_packet_limit_is_told_by_what_a_job_makes_of_it(
    broker: InProcessBroker, tmp_path: Path, limit: int, state: str
) -> None:
    found, _ = examine(visit(lambda client_id: broker.transport(client_id, max_packet_bytes=limit), tmp_path))
    assert by_name(found)["packet limit"].state == state


@pytest.mark.mosquitto
@needs_mosquitto
def test_a_limit_that_the_broker_does_not_tell_shows_in_large_messages_getting_lost(tmp_path: Path) -> None:
    strict = Mosquitto(tmp_path, "max_packet_size 100000")
    try:
        found, _ = examine(visit(strict.connect("3.1.1"), tmp_path, answer_s=3.0))
        assert by_name(found)["bandwidth"].state == "failed"
    finally:
        strict.stop()


@pytest.mark.mosquitto
@needs_mosquitto
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_an_access_list_that_denies_the_devices_own_topics_fails(
    guard: Guard, tmp_path: Path, protocol: ProtocolVersion
) -> None:
    found, _ = examine(_visit_as(guard, tmp_path, protocol, tier="pi4"))
    access = by_name(found)["access"]
    assert access.state == "failed" and ("refused" if protocol == "5" else "thrown away") in access.said


def _visit_as(guard: Guard, tmp_path: Path, protocol: ProtocolVersion, tier: str) -> Visit:
    settings = guard.settings("pi-1", protocol)
    base = visit(lambda client_id: Connection(settings, client_id=client_id), tmp_path, answer_s=1.0)
    return msgspec.structs.replace(base, echo=TOPICS.echo(tier, "pi-1"))


def test_a_broker_without_an_access_list_is_pointed_out_unless_it_is_this_machines(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    for host, state in (("10.0.0.1", "warning"), ("127.0.0.1", "ok")):
        found, _ = examine(visit(broker.transport, tmp_path, host=host))
        assert by_name(found)["access"].state == state


@pytest.mark.mosquitto
@needs_mosquitto
def test_a_broker_that_keeps_no_retained_messages_fails(tmp_path: Path) -> None:
    forgetful = Mosquitto(tmp_path, "retain_available false")
    try:
        found, _ = examine(visit(forgetful.connect(), tmp_path, answer_s=3.0))
        [refused] = [one for one in found if one.state == "failed"]
        assert "keeps no retained messages" in refused.said
    finally:
        forgetful.stop()


@pytest.mark.mosquitto
@needs_mosquitto
@pytest.mark.parametrize("persistence", [True, False])
def test_a_broker_that_forgets_over_a_restart_fails(tmp_path: Path, persistence: bool) -> None:
    lines = ["persistence true", f"persistence_location {tmp_path}/"] if persistence else []
    broker = Mosquitto(tmp_path, *lines)
    try:
        first, _ = examine(visit(broker.connect(), tmp_path))
        assert by_name(first)["persistence"].state == "skipped"
        broker.stop()
        broker.start()
        second, _ = examine(visit(broker.connect(), tmp_path))
        assert by_name(second)["persistence"].state == ("ok" if persistence else "failed")
    finally:
        broker.stop()


# --- data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "state", "said"),
    [
        ("a.csv", "text,label\nwarm,on\n", "ok", "1 rows"),
        ("a.csv", "text,label\nwarm,on\nwärmer,on\n", "warning", "2 rows, of which 1 unreadable"),
        ("a.csv", "text,label\nwarm,dim\ncold,on\n", "warning", "1 with a label that the job does not have"),
        ("a.csv", "text,label\nwarm,dim\n", "failed", "1 with a label that the job does not have"),
        ("a.csv", "text,tag\nwarm,on\n", "failed", "data.label_column: no column 'label'"),
        ("a.csv", "text;label\nwarm;on\n", "ok", "1 rows"),
        ("a.csv", "satz;label\nwarm;on\n", "failed", "no column 'text' in"),
        ("a.csv", "text,label\n", "failed", "no usable row"),
        ("a.jsonl", '{"text": "warm"}\n', "ok", "1 rows, of which 1 without a label"),
        ("", "", "failed", "there is no file"),
    ],
)
def test_the_data_is_looked_at_and_so_it_is_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, state: str, said: str
) -> None:
    path = tmp_path / (name or "missing.csv")
    if name:
        path.write_bytes(content.encode("latin-1"))
    plan = Plan(
        job=JOB, run="ab" * 16, revision=1, task=Task.TEXT_CLASSIFICATION, labels=("off", "on"), tiers={}
    )
    found = check_data(DataConfig(path=str(path)), plan)
    assert found.state == state and said in found.said
    foreign = "does not have" in said  # which takes a broker to know
    failed = main(["agent", "run", "--job", JOB, "--data", str(path), "--check"])
    assert failed == (state == "failed" and not foreign)
    assert foreign or said in "".join(capsys.readouterr())


# --- clock and certificates ------------------------------------------------------------------------------


@pytest.mark.mosquitto
@needs_mosquitto
def test_clock_and_certificates_are_judged_by_each_other(guard: Guard, tmp_path: Path) -> None:
    def states(clock_s: float) -> dict[str, str]:
        found = look_at(patient(guard, tmp_path), lambda: clock_s)
        return {one.check: one.state for one in found}

    now = time.time()
    assert states(now - 10 * DAY_S)["clock"] == "failed"
    soon, late = states(now + (LEAF_DAYS - 10) * DAY_S), states(now + (LEAF_DAYS + 10) * DAY_S)
    for name in ("certificate of this machine", "certificate of the broker"):
        assert (soon[name], late[name]) == ("warning", "failed")


@pytest.mark.mosquitto
@needs_mosquitto
def test_a_trainer_that_started_in_the_future_means_a_clock_that_is_behind_and_tiers_are_compared(
    guard: Guard, tmp_path: Path
) -> None:
    trainer = Connection(guard.settings("@trainer"), client_id="trainer")
    trainer.start(lambda _event: None)
    assert trainer.wait_connected(20)
    plan = Plan(
        job=JOB,
        run="ab" * 16,
        revision=1,
        task="text-classification",  # type: ignore[arg-type]
        labels=(),
        tiers={"other": TierPlan(backbone="m")},
        fence=int(time.time() + 10 * DAY_S),
    )
    trainer.publish(TOPICS.plan, pack(plan), retain=True)
    assert trainer.flush(10)
    found = by_name(look_at(patient(guard, tmp_path)))
    assert found["clock"].state == "failed" and "the trainer was started" in found["clock"].said
    assert found["tier"].state == "failed" and "only other" in found["tier"].said
    trainer.publish(TOPICS.plan, b"nonsense", retain=True)
    assert trainer.flush(10)
    assert by_name(look_at(patient(guard, tmp_path)))["plan"].state == "failed"
    trainer.close()


@pytest.mark.mosquitto
@needs_mosquitto
@pytest.mark.parametrize("why", ["revoked", "another authority's"])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_certificate_that_the_broker_refuses_is_said_to_be_that(
    guard: Guard, tmp_path: Path, why: str, protocol: ProtocolVersion
) -> None:
    if why == "revoked":
        guard.folder.revoke("pi-1")
        guard.reload()
    else:
        guard.identities["pi-1"] = Authority.new("another").client("pi-1")
    found: list[Finding] = []

    def refused() -> bool:
        found[:] = look_at(patient(guard, tmp_path, protocol))
        return by_name(found)["broker"].state == "failed"

    until(refused, "the broker has read its list")
    told = by_name(found)
    assert told["certificate at the broker"].state == "failed"
    assert ("revoked" if why == "revoked" else "unknown ca") in told["certificate at the broker"].said
    assert "refuses the certificate" in told["broker"].said
    assert "sidestream broker run" not in told["broker"].remedy


@pytest.mark.mosquitto
@needs_mosquitto
def test_files_that_are_not_there_fail(guard: Guard, tmp_path: Path) -> None:
    broken = patient(guard, tmp_path)
    Path(broken.broker.cert_file).write_text("no certificate")
    found = by_name(look_at(broken))
    assert found["tls"].state == found["certificate of this machine"].state == "failed"
    assert "broker" not in found, "there is no use in trying"


# --- the machine -----------------------------------------------------------------------------------------


def test_a_full_or_read_only_disk_is_found(tmp_path: Path) -> None:
    assert check_state(tmp_path, 1).state == "ok"
    assert check_state(tmp_path, 10**9).state == "warning"
    (tmp_path / "file").write_text("")
    assert check_state(tmp_path / "file" / "below", 1).state == "failed"


def test_little_memory_is_found(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    for text, state in (
        ("MemTotal: 900000 kB\nMemAvailable:   100000 kB\n", "warning"),
        ("MemAvailable: 4000000 kB\n", "ok"),
        ("nothing", "skipped"),
    ):
        meminfo.write_text(text)
        assert check_memory(512, meminfo).state == state


@pytest.mark.parametrize(
    ("script", "said"), [("kill -ILL $$", "signal 4"), ("echo no torch >&2; exit 1", "no torch")]
)
def test_a_torch_that_cannot_be_imported_is_found(tmp_path: Path, script: str, said: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    finding = check_torch(str(python))
    assert finding.state == "failed" and said in finding.said and finding.remedy


def test_a_backbone_that_is_missing_or_another_one_is_found(tiny: Path) -> None:
    tier = TierPlan(backbone=str(tiny))
    other = check_backbone(str(tiny), msgspec.structs.replace(tier, fingerprint="0" * 64))
    assert other.state == "failed" and "but the job's is 0000" in other.said
    missing = check_backbone("/no/such/folder", None)
    assert missing.state == "failed" and "there is no such folder" in missing.said
    (tiny / "model.safetensors").write_bytes(b"damaged")
    assert check_backbone(str(tiny), None).state == "failed"
    assert check_backbone("", None).state == "skipped"
