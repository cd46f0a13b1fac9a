"""What any task has learnt is exported to a folder that answers by itself, as the devices do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import sidestream
from side_trainer.operator.audit import export
from sidestream.contract.errors import BackboneError, DataError, StateError
from sidestream.side_network.exported import INDEX, WEIGHTS
from tests.agent.tiny import save_tiny

WORDS = ("lights", "heat", "kitchen")
TEXTS = [f"{one} {other}" for one in WORDS for other in WORDS]
TASKS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "text-classification": ([text.split()[0] for text in TEXTS], {"labels": list(WORDS)}),
    "multi-label-classification": ([sorted(set(text.split())) for text in TEXTS], {"labels": list(WORDS)}),
    "regression": ([float(len(text)) for text in TEXTS], {}),
    "token-classification": ([["N", "O"] for _ in TEXTS], {"labels": ["N", "O"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_export_of_any_task_answers_as_the_device_does(task: str, tmp_path: Path) -> None:
    labels, settings = TASKS[task]
    backbone = save_tiny(tmp_path / "model", "bert")

    @sidestream.source("rows")
    def rows(config: object) -> Any:
        for _ in range(4):
            for text, label in zip(TEXTS, labels, strict=True):
                yield {"text": text, "label": label if isinstance(label, list | str) else str(label)}

    tiers = {"pi": {"backbone": str(backbone), "sampling": "all"}}
    with sidestream.broker() as broker:
        common = {"broker": broker.url, "job": "colours"}
        form = {"tiers": tiers, "learner": {"passes": 2.0}, "weights_codec": "int8"}
        learner = {**common, **settings, "task": task, **form}
        device: dict[str, Any] = {
            **common,
            "tier": "pi",
            "device": "d",
            "data": {"plugin": "rows"},
            "exit_when_done": True,
        }
        with (
            sidestream.trainer(**learner, state_dir=tmp_path / "t", idle_after_s=0.3),
            sidestream.agent(**device, state_dir=tmp_path / "a") as agent,
        ):
            assert agent.wait(120)
    export(tmp_path / "t", tmp_path / "out", "hf")
    model, own = sidestream.load(tmp_path / "out"), sidestream.load(tmp_path / "a")
    assert (model.task, model.version) == (task, own.version)
    assert model.predict(TEXTS) and len(model.forward(TEXTS)) >= len(TEXTS)
    expected = own.forward(TEXTS)
    error = max(0.05, 0.01 * float(abs(expected).max()))
    assert model.forward(TEXTS) == pytest.approx(expected, abs=error), "devices have int8"
    seen: list[Any] = []

    def count(truths: Sequence[Any], answers: Sequence[Any]) -> int:
        seen.extend(answers)
        return len(truths)

    found = model.evaluate(TEXTS, labels, metrics={"count": count})
    assert found["count"] == len(TEXTS) and len(seen) == len(TEXTS) and len(found) > 1
    [one] = model(TEXTS[0])
    assert {"score", "scores"} & one.keys()
    if task == "text-classification":
        assert one == {"label": seen[0], "score": pytest.approx(model.predict(TEXTS[:1])[0].probability)}
    if task == "regression":
        with pytest.raises(DataError, match="no number"):
            model.evaluate(["a"], ["many"])
    with pytest.raises(ValueError, match="1 texts and 2 labels"):
        model.evaluate(["a"], ["b", "c"])
    other = save_tiny(tmp_path / "other", "bert", seed=5)
    with pytest.raises(BackboneError, match="not the job's"):
        sidestream.load(tmp_path / "out", backbone=str(other))
    (tmp_path / "out" / WEIGHTS).write_bytes((tmp_path / "out" / WEIGHTS).read_bytes()[:-4] + b"abcd")
    with pytest.raises(StateError, match="damaged"):
        sidestream.load(tmp_path / "out")
    (tmp_path / "out" / INDEX).write_text("{}")
    with pytest.raises(StateError, match="no export that can be read"):
        sidestream.load(tmp_path / "out")
