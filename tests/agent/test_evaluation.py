"""What a version is worth on a device is measured by what the device answers with."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from edge_agent.batches.batch_maker import BatchMaker
from edge_agent.samples.sample import Row
from edge_agent.weights.evaluation import EvaluationSet
from sidestream.backbone.sampled import Sampled
from sidestream.contract.quality import Tally
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.side_network.inference import InferenceNetwork

VECTORS = np.random.default_rng(0).standard_normal((2, 6, 64)).astype(np.float32)


class Targets:
    def read(self, label: str, text: str, *, judge: bool) -> int:
        return int(label)

    def stack(self, targets: list[int], sampled: Sampled) -> list[int]:
        return targets

    def tally(self, answers: Floats, targets: list[int], scale: object) -> Tally:
        return Tally()


class Maker:
    """Whatever its devices upload by: nothing here writes it."""

    targets = Targets()

    def forward(self, inputs: list[object]) -> Sampled:
        return Sampled(vectors=VECTORS, lengths=np.array([2, 4]))


class Network:
    scale = None

    def __init__(self) -> None:
        self.asked: list[Floats] = []

    def predict(self, align: str, vectors: Floats, lengths: Any) -> Floats:
        self.asked.append(vectors)
        return np.zeros((len(lengths), 2), np.float32)

    def probe(self, align: str, vectors: Floats, lengths: Any) -> None:
        return None


def test_a_version_is_judged_by_what_is_answered_with_and_not_by_what_travels() -> None:
    rows = [Row(input="a text", label="1") for _ in range(2)]
    network = Network()
    evaluation = EvaluationSet(
        cast(BatchMaker, Maker()), Task.TEXT_CLASSIFICATION, lambda: rows, stopped=lambda: False
    )
    score = evaluation.measure(cast(InferenceNetwork, network), "a")
    assert score is not None and score.samples == 2
    (asked,) = network.asked
    assert np.abs(asked - VECTORS).max() < 0.02 * np.abs(VECTORS).max()
