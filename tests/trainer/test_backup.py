"""A copy of a state directory is all that it takes to go on elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from contract.errors import StateError
from side_trainer.audit import read_state, verify
from side_trainer.backup import backup
from side_trainer.checkpoint import write_checkpoint
from side_trainer.fold import Fold
from side_trainer.journal import Journal
from tests.trainer.conftest import fold_all
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
