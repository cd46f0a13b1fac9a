"""What a trainer, an agent, a broker or a demo keeps is its owner's only, whoever made the folder."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from broker_config.embedded.broker import EmbeddedBroker
from broker_config.testing.inprocess import InProcessBroker
from side_trainer.operator.backup import backup
from side_trainer.operator.rebuild import rebuild
from sidestream.contract.errors import BrokerError, StateError
from sidestream.demo.files import DemoSettings, FleetFiles
from sidestream.host.state_dir import make_private, prepare
from tests.e2e.in_process import Kind, accuracies, agent, settings, table
from tests.trainer.test_trainer import Listener, trainer


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    torch.set_num_threads(1)
    before = os.umask(0o022)
    yield
    os.umask(before)


def _open_to_others(folder: Path) -> dict[str, str]:
    """What others could read or enter, with its mode."""
    modes = {path: path.lstat().st_mode for path in (folder, *folder.rglob("*")) if path.exists()}
    return {str(path): oct(mode) for path, mode in modes.items() if mode & 0o077 and not stat.S_ISLNK(mode)}


def _made_by_hand(folder: Path) -> Path:
    folder.mkdir()
    (folder / "lock").write_text("of an older version")
    (folder / "adopted").mkdir()
    (folder / "adopted" / "kept").write_text("of an older version")
    (folder / "journal-before-20260101-000000-9.db").write_text("of an older version")
    assert len(_open_to_others(folder)) == 5
    return folder


def test_while_a_fleet_runs_and_in_a_backup_and_a_rebuilt_journal(tmp_path: Path) -> None:
    kept, state = _made_by_hand(tmp_path / "trainer"), _made_by_hand(tmp_path / "state-small")
    file = settings(tmp_path, table(tmp_path, "small", Kind("bert", 2, 32)), blocks=2, passes=1)
    with InProcessBroker() as broker, trainer(broker, file.load(), file):
        listener = Listener(broker.transport("watch"))
        with agent(broker, tmp_path, "small", samples=40):
            accuracies(listener, {"small": 40})
            assert {"agent.db-wal", "agent.db-shm"} <= {path.name for path in state.iterdir()}
            assert _open_to_others(state) == _open_to_others(kept) == {}
            assert backup(kept, tmp_path / "backup") > 1
    rebuild(kept, ["small-1"])
    assert _open_to_others(state) == _open_to_others(kept) == _open_to_others(tmp_path / "backup") == {}


@pytest.mark.embedded
def test_where_a_broker_keeps_what_waits(tmp_path: Path) -> None:
    folder = _made_by_hand(tmp_path / "broker")
    with EmbeddedBroker(data_dir=folder, kind="amqtt"):
        assert _open_to_others(folder) == {}


def test_the_texts_that_a_demo_deals_out(tmp_path: Path) -> None:
    files = FleetFiles(DemoSettings(devices=1, max_samples=60), tmp_path)
    files.write("demo", "mqtt://127.0.0.1:1")
    texts = sorted(tmp_path.rglob("*.jsonl"))
    assert len(texts) == 2 and not any(_open_to_others(path) for path in texts)


def test_a_link_is_not_followed_and_a_program_stays_one(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "state"
    outside.write_text("somebody else's")
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "link").symlink_to(outside)
    (folder / "program").touch(0o755)
    make_private(folder)
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644
    assert stat.S_IMODE((folder / "program").stat().st_mode) == 0o700


def test_what_was_never_a_state_directory_keeps_its_files_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "notes").touch(0o644)
    prepare(tmp_path)
    assert stat.S_IMODE((tmp_path / "notes").stat().st_mode) == 0o644
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_a_folder_that_is_everybodys_is_refused_and_stays_so(tmp_path: Path) -> None:
    (tmp_path / "somebody's").touch()
    tmp_path.chmod(0o1777)
    with pytest.raises(StateError, match="it is everybody's; name a folder in it"):
        prepare(tmp_path)
    with pytest.raises(BrokerError, match="it is everybody's"), EmbeddedBroker(data_dir=tmp_path):
        pass
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777


def test_a_folder_that_cannot_be_closed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_path: Path, _mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    tmp_path.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refuse)
    with caplog.at_level(logging.WARNING):
        assert prepare(tmp_path) == tmp_path
    assert f"able to read {tmp_path} (Operation not permitted)" in caplog.text
