"""A tiny backbone of each family, an in-process broker, and a trainer that is a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from broker_config.testing.inprocess import InProcessBroker
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from tests.agent.fake_trainer import FakeTrainer
from tests.agent.tiny import save_tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved tiny model by family: bert, roberta, opt, gpt2, llama."""
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(root / family, family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def bert(tiny: Callable[[str], Path]) -> TorchBackbone:
    return TorchBackbone.load(str(tiny("bert")))


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as broker:
        yield broker


@pytest.fixture
def trainer(broker: InProcessBroker, bert: TorchBackbone) -> Iterator[FakeTrainer]:
    with FakeTrainer(broker, bert) as trainer:
        yield trainer
