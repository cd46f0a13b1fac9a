"""The trainer's log says once of a device that its history and the journal's have parted, whoever noticed;
and a trainer does not begin anew where a part of its state is missing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import pytest

from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.receive.setbacks import Setbacks
from side_trainer.trainer import run_trainer
from sidestream.contract.errors import StateError
from sidestream.contract.messages import Telemetry
from sidestream.contract.topics import Uplink
from tests.trainer.conftest import config

OLD, NEW, NEWER = "a" * 32, "b" * 32, "c" * 32


def started(folder: Path) -> Setbacks:
    """As after a start of the trainer."""
    return Setbacks(Journal(folder / FILE_NAME), cast(TrainerSigner, None))


def tell(setbacks: Setbacks, stream: str, *, forked: int = 1) -> None:
    at = Uplink(tier="pi5", device="kitchen", kind="telemetry")
    setbacks.on_telemetry(at, Telemetry(stream=stream, streams_forked=forked))


def said(caplog: pytest.LogCaptureFixture) -> int:
    return sum("kitchen (pi5)" in record.getMessage() for record in caplog.records)


def test_a_device_that_noticed_by_itself_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setbacks = started(tmp_path)
    for _ in range(3):
        tell(setbacks, NEW)
    assert said(caplog) == 1


def test_a_device_that_never_began_a_new_stream_is_not_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell(started(tmp_path), OLD, forked=0)
    assert said(caplog) == 0


def test_a_restart_does_not_tell_of_it_again_and_a_further_stream_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell(started(tmp_path), NEW)
    again = started(tmp_path)
    tell(again, NEW)
    assert said(caplog) == 1
    tell(again, NEWER)
    assert said(caplog) == 2


def test_what_the_trainer_noticed_first_is_not_told_of_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setbacks = started(tmp_path)
    setbacks.on_fork(Uplink(tier="pi5", device="kitchen", kind="activations"), OLD)
    tell(setbacks, NEW)
    assert said(caplog) == 1
    tell(setbacks, NEWER)
    assert said(caplog) == 2


def test_a_folder_with_checkpoints_and_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"checkpoint-{7:012}.safetensors").write_bytes(b"of a journal that is not here")
    tmp_path.chmod(0o700)
    with pytest.raises(StateError, match=r"journal\.db is missing.*restore the whole state directory"):
        run_trainer(config(tmp_path), threading.Event())
    assert not (tmp_path / FILE_NAME).exists()
