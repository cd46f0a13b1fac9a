"""Weights travel in as few directions as answers allow."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.side_tuning.batch_loss import answers_by
from sidestream.contract.plan import SideNetworkSpec
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import decode_bundle, encode_bundle
from sidestream.side_network.change import restored
from sidestream.side_network.initial import initial
from sidestream.side_network.narrowing import MOST_APART, Narrowing, narrowest
from tests.trainer.conftest import append, config, devices, fold_all, learnt, settle

DOWN = "adapters.0.down.weight"
SHAPE = (96, 96)


def grown(sizes: list[float]) -> dict[str, Floats]:
    """A matrix that has changed in some directions, by so much in each."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((96, len(sizes))))[0] for _ in range(2))
    return {DOWN: (initial(1, DOWN, SHAPE) + (left * sizes) @ right.T).astype(np.float32)}


def answers_along(right: int) -> object:
    """Two labels, told by how a matrix turns one direction of a fixed draw."""
    rng = np.random.default_rng(0)
    lefts, rights = (np.linalg.qr(rng.standard_normal((96, 8)))[0] for _ in range(2))

    def answers(weights: Mapping[str, Floats]) -> np.ndarray:
        asked.append(1)
        said = float(lefts[:, right] @ (weights[DOWN] - initial(1, DOWN, SHAPE)) @ rights[:, right])
        logits = np.array([[said, -said]])
        found: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return found

    asked: list[int] = []
    answers.asked = asked  # type: ignore[attr-defined]
    return answers


def test_answers_decide_how_many_directions_travel() -> None:
    weights = grown([3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1])
    ranks = []
    for direction in (0, 1, 2):
        way = narrowest(weights, 1, answers_along(direction))  # type: ignore[arg-type]
        assert way is not None
        ranks.append(len(way.of(weights)[f"{DOWN}:left"]))
    assert ranks == [1, 2, 3], "the one that the answers go by is among those that are kept, and few others"


def test_where_no_share_is_good_enough_weights_travel_as_they_are() -> None:
    weights = grown([1.0] * 8)

    def exact(given: Mapping[str, Floats]) -> np.ndarray:
        off = 3.0 * (given is not weights)
        logits = np.array([[off, -off]])
        found: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return found

    assert narrowest(weights, 1, exact) is None


def test_the_same_weights_are_tried_once() -> None:
    weights, answers, narrowing = grown([3.0, 0.1]), answers_along(0), Narrowing()
    find = partial(narrowest, weights, 1, answers)  # type: ignore[arg-type]
    first = narrowing.of(5, find, final=True)
    asked = len(answers.asked)  # type: ignore[attr-defined]
    assert narrowing.of(5, find, final=True) is first
    assert len(answers.asked) == asked > 0  # type: ignore[attr-defined]
    narrowing.of(6, find, final=True)
    assert len(answers.asked) > asked  # type: ignore[attr-defined]


@pytest.mark.parametrize("tier", ["big", "small"])
def test_what_devices_get_is_short_and_answers_as_the_trainers_weights(
    journal: Journal, tmp_path: Path, tier: str
) -> None:
    job = Job(config(tmp_path, side_network=SideNetworkSpec(width=96, inner=96)), journal)
    fleet = devices()
    settle(job, fleet)
    for _ in range(12):
        for device in fleet[:2]:
            append(journal, device, device.batch(job.plan))
    fold = fold_all(journal, Fold(journal))
    method = learnt(fold)
    packed = fold.method.bundles(journal.run, 1, "packed", final=True)[tier]
    bundle = decode_bundle(packed)
    whole = fold.method.bundles(journal.run, 1, "int8")[tier]
    tensors = decode_bundle(whole).tensors
    assert {name: one.shape for name, one in bundle.tensors.items()} == {
        name: one.shape for name, one in tensors.items()
    }
    assert len(fold.method.bundles(journal.run, 1, "packed")[tier]) <= len(packed), "a passing version"
    assert len(packed) < 0.8 * len(encode_bundle(bundle.about, tensors, codec="packed"))
    way = method._narrow(final=True)
    assert way is not None
    rows, weights = method._latest(64), method.weights()
    back = restored(way.of(weights), lambda name, shape: initial(0, name, shape))
    before, after = (answers_by(one, method.facts, method._place, rows) for one in (weights, back))
    assert abs(float((np.exp(before) * (before - after)).sum(axis=1).mean())) <= MOST_APART
