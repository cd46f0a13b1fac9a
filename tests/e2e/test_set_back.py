"""State that was set back or copied, with real processes: what is told, and that the counts come out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.embedded.broker import EmbeddedBroker
from tests.e2e.processes import Processes, write_samples

pytestmark = pytest.mark.embedded


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Processes]:
    with EmbeddedBroker(data_dir=tmp_path / "broker", kind="amqtt") as broker:
        processes = Processes(tmp_path, broker.url)
        yield processes
        processes.close()


def add_rows(fleet: Processes, device: str, samples: int, seed: str) -> None:
    """Append rows to a device's file that stand nowhere else."""
    more = write_samples(fleet.folder / "more.jsonl", samples, seed=seed).read_text()
    with (fleet.folder / f"{device}.jsonl").open("a") as file:
        for number, line in enumerate(more.splitlines()):
            row = json.loads(line)
            file.write(json.dumps({**row, "text": f"{row['text']} {seed} {number}"}) + "\n")


def run_agent(fleet: Processes, device: str, samples: int = 0, *flags: str) -> None:
    fleet.expect_exit(fleet.agent(device, samples, *flags), device)


def assert_samples(fleet: Processes, samples: int) -> None:
    state = fleet.state()
    assert state is not None and state.samples == samples
    assert "the digest matches" in fleet.run("trainer", "verify", "--state-dir", str(fleet.trainer_state))


def test_a_device_restored_from_an_older_copy_loses_nothing_and_sends_nothing_twice(fleet: Processes) -> None:
    trainer = fleet.trainer()
    run_agent(fleet, "a", 40)
    shutil.copytree(fleet.folder / "a", fleet.folder / "image")
    add_rows(fleet, "a", 40, "second")
    run_agent(fleet, "a")
    shutil.rmtree(fleet.folder / "a")
    (fleet.folder / "image").rename(fleet.folder / "a")
    add_rows(fleet, "a", 40, "third")
    run_agent(fleet, "a")
    assert fleet.log("a").count("have parted") == 1
    fleet.stop(trainer, "trainer")
    assert_samples(fleet, 120)


def test_two_boards_that_go_on_from_one_state_folder_each_count_once(fleet: Processes) -> None:
    trainer = fleet.trainer()
    run_agent(fleet, "a", 40)
    shutil.copytree(fleet.folder / "a", fleet.folder / "b")
    add_rows(fleet, "a", 40, "of the first")
    add_rows(fleet, "b", 40, "of the second")
    settings = (fleet.folder / "a.toml").read_text()
    (fleet.folder / "b.toml").write_text(settings.replace('"a"', '"b"').replace("/a", "/b"))
    both = [("a", fleet.agent("a", 0)), ("b", fleet.agent("b", 0))]
    for name, process in both:
        fleet.expect_exit(process, name)
    fleet.stop(trainer, "trainer")
    assert_samples(fleet, 120)


def test_a_trainer_restored_from_a_backup_gets_back_what_it_lacks(fleet: Processes) -> None:
    trainer, copy = fleet.trainer(), fleet.folder / "backup"
    run_agent(fleet, "a", 60)
    fleet.run("trainer", "backup", "--state-dir", str(fleet.trainer_state), "--out", str(copy))
    add_rows(fleet, "a", 80, "after the backup")
    run_agent(fleet, "a")
    fleet.stop(trainer, "trainer")
    shutil.rmtree(fleet.trainer_state)
    copy.rename(fleet.trainer_state)
    trainer = fleet.trainer()
    run_agent(fleet, "a")
    assert "journal was set back" in fleet.log("a") and "LOST" not in fleet.log("a")
    fleet.stop(trainer, "trainer")
    assert "journal was set back" in (fleet.folder / "trainer.log").read_text()
    assert_samples(fleet, 140)


def test_what_a_device_no_longer_keeps_is_told_with_its_number(fleet: Processes) -> None:
    trainer, copy = fleet.trainer(), fleet.folder / "backup"
    run_agent(fleet, "a", 60)
    fleet.run("trainer", "backup", "--state-dir", str(fleet.trainer_state), "--out", str(copy))
    add_rows(fleet, "a", 80, "after the backup")
    run_agent(fleet, "a", 0, "--keep-receipted-share", "0")
    fleet.stop(trainer, "trainer")
    shutil.rmtree(fleet.trainer_state)
    copy.rename(fleet.trainer_state)
    trainer = fleet.trainer()
    run_agent(fleet, "a")
    fleet.stop(trainer, "trainer")
    log = (fleet.folder / "trainer.log").read_text()
    assert log.count("80 samples that were receipted") == 1 and "are LOST" in log
    assert "80 samples LOST" in fleet.run("trainer", "status", "--state-dir", str(fleet.trainer_state))
    assert_samples(fleet, 60)
