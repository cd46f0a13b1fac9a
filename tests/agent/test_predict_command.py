from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.commands.agent import texts_of
from sidestream.backbone.backbone import Backbone
from sidestream.cli import main
from tests.agent.fake_trainer import FakeTrainer
from tests.agent.fleet import Running


@pytest.fixture
def state(broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path) -> Path:
    trainer.publish_plan()
    trainer.publish_weights(7, favour=1)
    with Running(broker, bert, tmp_path):
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == 7)
    return tmp_path / "state-pi-1"


def test_texts_on_standard_input_are_answered_one_a_line(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("turn on\n\nthe light\n"))
    assert main(["agent", "predict", "--state-dir", str(state), "--json"]) == 0
    said = capsys.readouterr()
    assert not said.err
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert all(0.5 < answer["probability"] < 1 for answer in answers)
    assert [(answer["text"], answer["label"]) for answer in answers] == [
        ("turn on", "on"),
        ("the light", "on"),
    ]


def test_texts_come_as_arguments_or_from_a_file(tmp_path: Path) -> None:
    assert list(texts_of(["turn on", "the light"], None)) == ["turn on", "the light"]
    file = tmp_path / "texts.txt"
    file.write_text("turn on\n\n  the light\n")
    assert list(texts_of([], file)) == ["turn on", "the light"]


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict = ["agent", "predict", "--state-dir", str(tmp_path)]
    for rest, wrong in (
        (["turn on"], "no weights have been adopted yet"),
        (["--file", str(tmp_path / "none.txt")], "none.txt cannot be read"),
    ):
        assert main([*predict, *rest]) == 1
        said = capsys.readouterr()
        assert wrong in said.err and said.err.count("\n") == 1 and not said.out
