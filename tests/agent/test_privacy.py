"""A device does what the plan says before anything is stored or sent, and answers without the noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_agent.batches.batch_maker import BatchMaker
from edge_agent.batches.coded import made_by, read
from edge_agent.store.streams import Slot
from sidestream.backbone.runtimes import load_backbone
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.privacy import parse_privacy
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec, Floats, decode
from sidestream.contract.wire import unpack
from tests.agent.tiny import LAYERS, WIDTH, save_tiny

TEXTS = ["turn the lights on", "heat up now please"]
SLOT = Slot("a" * 32, 1, 1, 0, "")


def tier(privacy: str) -> TierPlan:
    return TierPlan(
        backbone="m",
        depth=LAYERS,
        width=WIDTH,
        taps=(2, LAYERS),
        fingerprint="f",
        sampling="mean",
        codec=Codec.F32,
        privacy=privacy,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "bert")


def maker(folder: Path, privacy: str) -> BatchMaker:
    plan = Plan(
        job="j",
        run="0" * 32,
        revision=1,
        task=Task.TEXT_CLASSIFICATION,
        labels=("a", "b"),
        tiers={"t": tier(privacy)},
    )
    return BatchMaker(load_backbone(str(folder)), plan, "t", 1 << 20)


def sent(one: BatchMaker) -> Floats:
    """[B, 2, d] of a message."""
    packed = one.packer(one.forward(TEXTS), [0, 1], np.arange(2), [])
    return decode(unpack(ActivationBatch, packed(SLOT)).activations)


def test_noise_is_in_what_is_sent_and_in_what_waits_for_a_label_and_nowhere_else(folder: Path) -> None:
    one = maker(folder, "sketch:8, noise:0.5")
    plain = one.forward(TEXTS)
    assert np.array_equal(one.forward(TEXTS).vectors, plain.vectors), "what it answers with has no noise"
    assert np.linalg.norm(plain.vectors, axis=-1) == pytest.approx(WIDTH**0.5)
    for vectors in (sent(one), decode(read(one.keep(plain, 0)).activations)):
        noise = vectors - plain.vectors[:, : vectors.shape[1]]
        assert 0.1 < np.linalg.norm(noise, axis=-1).mean() / WIDTH**0.5 < 1.5
    assert not np.array_equal(sent(one), sent(one))


def test_without_privacy_nothing_is_changed(folder: Path) -> None:
    one = maker(folder, "")
    assert np.array_equal(sent(one), one.forward(TEXTS).vectors)


def test_what_waits_for_a_label_is_computed_again_under_another_setting() -> None:
    settings = ["", "noise:1", "noise:2"]
    assert len({made_by(tier(one), Task.TEXT_CLASSIFICATION) for one in settings}) == 3
    assert parse_privacy(tier("noise:2").privacy).noise == 2
