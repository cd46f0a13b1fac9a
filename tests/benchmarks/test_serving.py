"""The benchmark of ``agent serve`` asks every way in turns, and compares with the bare predictor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks import serving
from edge_agent.answers.answer import Prediction
from edge_agent.answers.predictor import Predictor
from edge_agent.serving.http import PredictionServer
from edge_agent.serving.predictions import Predictions
from sidestream.contract.tasks import Modality


class _Counting:
    version, task, labels, modality = 1, "text-classification", ("a",), Modality.TEXT

    def __init__(self) -> None:
        self.asked = 0

    def predict(self, texts: Sequence[str]) -> list[Any]:
        self.asked += 1
        return [Prediction(label="a", probability=1.0) for _ in texts]


def test_each_way_is_asked_as_often_and_told_beside_the_bare_predictor(tmp_path: Path) -> None:
    fake = _Counting()
    with (
        Predictions(tmp_path, lambda folder: cast(Predictor, fake)) as predictions,
        PredictionServer(predictions, 0) as server,
        serving.ways(predictions, server, "x") as asks,
    ):
        found = serving.measure(asks, 3)
    assert fake.asked == 4 * (3 + serving._WARM)
    lines = serving.table(found).splitlines()
    assert len(lines) == 6 and lines[2].split("|")[3].strip() == "1.00"


def test_a_folder_without_weights_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serving.main(["--state-dir", str(tmp_path)]) == 1
    assert "no weights have been adopted" in capsys.readouterr().err
