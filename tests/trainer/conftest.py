"""A job whose devices are made of numbers: activations drawn round a centre for each label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from broker_config.testing.inprocess import InProcessBroker
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Claim, Journal, Taken
from side_trainer.method import Step
from side_trainer.receive.inbox import arrived
from side_trainer.settings.schema import LearnerSettings, TrainerConfig
from side_trainer.settings.tier import TierConfig
from side_trainer.side_tuning.method import SideTuningMethod
from sidestream.contract.messages import ActivationBatch, Status, to_bin
from sidestream.contract.plan import Plan, SideNetworkSpec, labels_id
from sidestream.contract.tensors import Codec, encode
from sidestream.contract.wire import pack

LABELS = ("amber", "blue", "cyan", "dun")
DEPTHS = {"big": 6, "small": 3, "wide": 4}
WIDTHS = {"big": 16, "small": 16, "wide": 24}


def config(state_dir: Path, **changes: object) -> TrainerConfig:
    settings: dict[str, object] = {
        "job": "colours",
        "state_dir": str(state_dir),
        "labels": LABELS,
        "tiers": {"big": TierConfig(backbone="m"), "small": TierConfig(backbone="m", layers=3)},
        "learner": LearnerSettings(seed=5, passes=2, replay=1, pass_rows=8, replay_rows=8, least_updates=0),
        "side_network": SideNetworkSpec(width=128, inner=128),
        "metrics_port": -1,
        "page": False,
        "idle_after_s": 0.05,
        "publish_every_s": 0.05,
        "publish_share": 0.0,
        "publish_gain": 0.0,
        "checkpoint_every_s": 0.2,
    }
    return TrainerConfig(**{**settings, **changes})  # type: ignore[arg-type]


@dataclass
class FakeDevice:
    """Makes the batches of one device, as an agent would."""

    name: str
    tier: str
    stream: str
    seed: int = 0
    sequence: int = 0
    samples: int = 0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def birth(self, *, labels: tuple[str, ...] = (), birth: int = 1) -> Status:
        return Status(
            state="online",
            birth=birth,
            stream=self.stream,
            fingerprint=f"weights-of-{self.tier}",
            depth=DEPTHS[self.tier],
            width=WIDTHS[self.tier],
            labels=labels,
        )

    def batch(self, plan: Plan, *, rows: int = 8, label: int | None = None) -> ActivationBatch:
        taps = plan.tiers[self.tier].taps
        targets = self.rng.integers(len(plan.labels), size=rows) if label is None else np.full(rows, label)
        lengths = self.rng.integers(1, 5, size=rows)
        width = WIDTHS[self.tier]
        centres = np.random.default_rng(99).standard_normal((len(plan.labels), width))
        owner = np.repeat(targets, lengths)
        noise = self.rng.standard_normal((len(taps), len(owner), width))
        self.sequence += 1
        ids = range(self.samples, self.samples + rows)
        self.samples += rows
        return ActivationBatch(
            stream=self.stream,
            sequence=self.sequence,
            floor=1,
            fingerprint=plan.tiers[self.tier].fingerprint,
            labels_id=labels_id(plan.labels),
            taps=taps,
            sampling="segments:4",
            samples=to_bin(list(ids), "<u4"),
            lengths=to_bin(lengths, "<u2"),
            targets=to_bin(targets, "<u2"),
            activations=encode(centres[owner][None] + noise * 0.7, Codec.INT8),
        )


def devices() -> list[FakeDevice]:
    return [
        FakeDevice(name=f"dev-{index}", tier=tier, stream=f"{index:032x}", seed=index)
        for index, tier in enumerate(("big", "small", "big"))
    ]


def settle(job: Job, fleet: list[FakeDevice]) -> None:
    for device in fleet:
        job.on_birth(device.tier, device.name, device.birth(), 0.0)


def append(journal: Journal, device: FakeDevice, batch: ActivationBatch) -> bool:
    with journal.transaction():
        return put(journal, device, batch).claim is Claim.NEW


def put(journal: Journal, device: FakeDevice, batch: ActivationBatch, **held: Any) -> Taken:
    """Within a transaction."""
    return journal.append_batch(arrived(batch, pack(batch), device.tier, device.name), **held)


def steps(journal: Journal, fold: Fold) -> Iterator[Step]:
    """Fold what there is, and what the method owes on it, as the learner does."""
    while True:
        while records := journal.read(fold.offset):
            yield from map(fold.apply, records)
        own = fold.method.next_own(0.0) if fold.begun else None
        if own is None:
            return
        journal.append(own[0].value, own[1])


def fold_all(journal: Journal, fold: Fold) -> Fold:
    """As :func:`steps`; return the fold."""
    for _ in steps(journal, fold):
        pass
    return fold


def learnt(fold: Fold) -> SideTuningMethod:
    """What a fold of side-tuning has learnt."""
    assert isinstance(fold.method, SideTuningMethod)
    return fold.method


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / FILE_NAME)
    yield opened
    opened.close()


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
