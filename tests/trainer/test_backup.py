"""A copy of a state directory is all that it takes to go on elsewhere."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from side_trainer.fold.checkpoint import write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.operator.audit import verify
from side_trainer.operator.backup import backup
from side_trainer.operator.rebuild import rebuild
from side_trainer.operator.status import read_state
from sidestream.contract.errors import StateError
from tests.trainer.conftest import fold_all
from tests.trainer.test_journal import STREAM, put
from tests.trainer.test_language_model import filled


def test_a_backup_of_a_language_models_job_is_verified_where_its_backbone_never_was(
    journal: Journal, tmp_path: Path
) -> None:
    filled(journal, tmp_path, batches=2)
    write_checkpoint(tmp_path, fold_all(journal, Fold(journal)), journal.run)
    copy = tmp_path.parent / f"{tmp_path.name}-copy"
    assert backup(tmp_path, copy) == journal.tail
    for original in ("model", "heads"):
        shutil.rmtree(tmp_path / original)
    assert verify(copy).matches
    assert read_state(copy).records == journal.tail
    with pytest.raises(StateError, match="exists already"):
        backup(tmp_path, copy)


def test_a_backup_of_no_journal_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no journal"):
        backup(tmp_path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


class _Watched(sqlite3.Connection):
    """Notes how durably it writes, once it has written."""

    synchronous: ClassVar[list[int]] = []

    def close(self) -> None:
        if self.total_changes:
            self.synchronous.append(self.execute("PRAGMA synchronous").fetchone()[0])
        super().close()


@pytest.mark.parametrize("tool", ["backup", "rebuild"])
def test_what_a_tool_writes_to_a_journal_reaches_the_disk_as_the_trainers_own(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    put(journal, 1)
    journal.close()
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=_Watched))
    _Watched.synchronous.clear()
    if tool == "backup":
        backup(tmp_path, tmp_path / "copy")
    else:
        rebuild(tmp_path, ["d"])
    assert set(_Watched.synchronous) == {2}


def test_what_a_backup_holds_is_marked_in_it_and_in_the_running_journal(
    journal: Journal, tmp_path: Path
) -> None:
    put(journal, 1)
    put(journal, 3)
    assert backup(tmp_path, tmp_path / "copy") == 2 and journal.backups == 1
    put(journal, 2)
    marked = Journal(tmp_path / "copy" / FILE_NAME, read_only=True)
    with contextlib.closing(marked):
        for one in (journal, marked):
            state = one.stream(STREAM)
            assert state is not None and state.saved == 1, "up to the first gap"
    backup(tmp_path, tmp_path / "again")
    state = journal.stream(STREAM)
    assert state is not None and (state.saved, journal.backups) == (3, 2)
