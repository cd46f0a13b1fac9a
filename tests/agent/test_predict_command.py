from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from broker_config.inprocess import InProcessBroker
from edge_agent.backbone import Backbone
from edge_agent.cli import texts_of
from tests.agent.fake_trainer import FakeTrainer
from tests.agent.fleet import Running

MAIN = """
import argparse, sys
from contract.errors import SidestreamError
from edge_agent import cli
parser = argparse.ArgumentParser()
cli.add_parser(parser.add_subparsers(required=True))
args = parser.parse_args(["agent", "predict", *sys.argv[1:]])
try:
    sys.exit(args.handler(args))
except SidestreamError as exc:
    sys.exit(f"error: {exc}")
"""


@pytest.fixture
def state(broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path) -> Path:
    trainer.publish_plan()
    trainer.publish_weights(7, favour=1)
    with Running(broker, bert, tmp_path):
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == 7)
    return tmp_path / "state-pi-1"


def predict(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MAIN, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)


def test_texts_on_standard_input_are_answered_one_a_line(state: Path) -> None:
    said = predict("--state-dir", str(state), "--json", stdin="turn on\n\nthe light\n")
    assert said.returncode == 0 and not said.stderr
    answers = [json.loads(line) for line in said.stdout.splitlines()]
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


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    said = predict("--state-dir", str(tmp_path), "turn on")
    assert said.returncode == 1 and said.stderr.count("\n") == 1
    assert "no weights have been adopted yet" in said.stderr
    said = predict("--state-dir", str(tmp_path), "--file", str(tmp_path / "none.txt"))
    assert "none.txt cannot be read" in said.stderr and said.stderr.count("\n") == 1
