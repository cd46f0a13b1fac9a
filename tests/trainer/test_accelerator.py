"""Where the side-network is learnt, and what verifying says elsewhere; no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from side_trainer.fold.checkpoint import write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import SettingsRecord
from side_trainer.operator import audit
from side_trainer.operator.audit import TOLERANCE, verify
from side_trainer.trainer import _placement
from sidestream.accelerator.torch_device import HERE, Placement
from sidestream.contract.errors import ConfigError
from sidestream.contract.tasks import Task
from tests.trainer.conftest import config, fold_all, learnt
from tests.trainer.test_fold import filled


class Meta(Placement):
    """Torch knows shapes only there, and refuses to mix them with what lies anywhere else."""

    def __init__(self) -> None:
        super().__init__(torch.device("meta"), "a test")
        self.fetched = 0

    def fetch(self, tensor: Tensor) -> Tensor:
        self.fetched += 1
        assert tensor.is_meta or tensor.numel() == 1
        return torch.ones(tensor.shape)


class Second(Placement):
    """A processor that is counted as another device: everything is sent there and fetched as from a GPU."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), "a test")
        self.sent = self.fetched = 0

    def send(self, tensor: Tensor) -> Tensor:
        self.sent += 1
        return tensor.clone()

    def fetch(self, tensor: Tensor) -> Tensor:
        self.fetched += 1
        return tensor.clone()


@pytest.mark.slow
def test_every_tensor_of_an_update_is_sent_to_its_device(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path)
    there = Meta()
    method = learnt(fold_all(journal, Fold(journal, placement=there)))
    assert method.network is not None and method.average is not None and method.updates > 12
    for network in (method.network, method.average):
        assert {one.device.type for one in network.state_dict().values()} == {"meta"}
    assert there.fetched >= 2 * method.updates  # losses to show, and whether the gradient is finite


@pytest.mark.slow
def test_by_way_of_another_device_the_same_is_learnt_and_restored(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path)
    there = Second()
    here, away = fold_all(journal, Fold(journal)), fold_all(journal, Fold(journal, placement=there))
    assert away.digest() == here.digest() and there.sent and there.fetched
    again = Fold(journal, placement=Second())
    again.restore(away.offset, away.updates, away.state())
    assert again.digest() == here.digest()


@pytest.mark.slow
def test_what_was_learnt_on_another_kind_of_device_is_held_to_a_tolerance(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Job(config(tmp_path), journal, "cuda")
    filled(journal, tmp_path / "none", idle=False)
    kinds = [
        msgspec.json.decode(one.payload, type=SettingsRecord).device
        for one in journal.others(journal.tail, ("settings",))
    ]
    assert kinds == ["cuda", "cpu"]
    fold = fold_all(journal, Fold(journal))
    average = learnt(fold).average
    assert average is not None
    with torch.no_grad():
        for one in average.parameters():
            one.mul_(1 + TOLERANCE / 2)
    write_checkpoint(tmp_path, fold, journal.run)
    found = verify(tmp_path)
    assert found.matches and not found.exact and found.elsewhere == "cpu and cuda, here it is cpu"
    assert 0 < found.distance < TOLERANCE
    monkeypatch.setattr(audit, "TOLERANCE", TOLERANCE / 4)
    assert not found.matches


def test_what_only_a_processor_learns_refuses_a_gpu_by_name(tmp_path: Path) -> None:
    assert _placement(config(tmp_path, compute_device="auto", task=Task.CAUSAL_LM)) is HERE
    with pytest.raises(ConfigError, match="compute_device: causal-lm is learnt on the processor"):
        _placement(config(tmp_path, compute_device="cuda", task=Task.CAUSAL_LM))
    with pytest.raises(ConfigError, match="compute_device: 'gpu' is no device"):
        config(tmp_path, compute_device="gpu").checked()
