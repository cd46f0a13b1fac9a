"""``agent samples`` and ``agent label``, beside a running agent and without one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.commands import agent as cli
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import DataError, StateError
from sidestream.contract.tasks import Task
from tests.agent.fake_trainer import TIER, FakeTrainer
from tests.agent.fleet import Running, sentence
from tests.agent.late import listed, write_rows, write_unlabelled

pytestmark = pytest.mark.slow

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def running(*arguments: str) -> str:
        parser = argparse.ArgumentParser()
        cli.add_parser(parser.add_subparsers(required=True))
        args = parser.parse_args(["agent", *arguments])
        assert args.handler(args) == 0
        return capsys.readouterr().out

    return running


@pytest.fixture
def agent(broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path) -> Iterator[Running]:
    trainer.publish_plan()
    trainer.publish_weights(7, favour=1)
    data = write_unlabelled(tmp_path / "train.jsonl", 6)
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 6)
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == 7)
        yield agent


@pytest.mark.slow
def test_samples_are_listed_labelled_and_trained_while_the_agent_runs(
    trainer: FakeTrainer, agent: Running, run: Run
) -> None:
    state = ("--state-dir", agent.config.state_dir)
    rows = [line.split("\t") for line in run("samples", *state).splitlines()]
    assert {row[3] for row in rows} == {sentence(number) for number in range(6)}
    assert {(row[1], row[2]) for row in rows} == {("waiting", "-")}
    first = rows[0][0]
    assert run("label", first, "on", *state).startswith("1 label noted")
    trainer.wait(lambda t: t.rows() == 1)
    assert len(run("samples", "--unlabelled", *state).splitlines()) == 5
    shown = json.loads(run("samples", "--json", *state).splitlines()[0])
    assert shown["id"] == first and (shown["status"], shown["label"]) == ("sent", "on")
    with pytest.raises(DataError, match="it is trained once, and cannot be taken back"):
        run("label", first, "off", *state)


def test_kept_activations_answer_without_the_backbone(
    bert: Backbone, agent: Running, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bert, "forward", None)
    state = ("--state-dir", agent.config.state_dir)
    found = [json.loads(line) for line in run("samples", "--predict", "--json", *state).splitlines()]
    assert [one["prediction"]["label"] for one in found] == ["on"] * 6
    assert all(0.5 < one["prediction"]["probability"] < 1 for one in found)
    line = run("samples", "--predict", *state).splitlines()[0].split("\t")
    assert line[3].startswith("on 0.")
    monkeypatch.setattr("edge_agent.weights.codebooks.find_codebooks", lambda tier, folder, reference: False)
    with pytest.raises(StateError, match="codebooks that the plan names are not here; run the agent"):
        run("samples", "--predict", *state)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "id,label\n{0},on\n{1},off\n"),
        ("labels.csv", "{0},on\n{1},off\n"),
        ("labels.tsv", "label\tid\non\t{0}\noff\t{1}\n"),
        ("labels.jsonl", '{{"id": "{0}", "label": "on"}}\n{{"id": "{1}", "label": "off"}}\n'),
    ],
)
def test_many_labels_come_in_a_file(
    trainer: FakeTrainer, agent: Running, run: Run, tmp_path: Path, name: str, text: str
) -> None:
    ids = [one.id for one in listed(agent.config.state_path)]
    file = tmp_path / name
    file.write_text(text.format(*ids))
    said = run("label", "--file", str(file), "--state-dir", agent.config.state_dir)
    assert said.startswith("2 labels noted")
    trainer.wait(lambda t: t.rows() == 2)
    assert sorted(trainer_targets(trainer)) == [0, 1]


def trainer_targets(trainer: FakeTrainer) -> list[int]:
    return [target for batch in trainer.journal.values() for target in batch.read_targets().tolist()]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("id,label\n{0},on\nnobody,off\n", "there is no sample 'nobody'"),
        ("id,label\n{0},on\n{1},onn\n", "did you mean 'on'"),
        ("id,label\n{0},on\n{1},\n", "has no label; nothing is noted"),
        ("id,label\n{0},on\n{1}\n", "1 rows that cannot be used; nothing is noted"),
        ("", "no rows that cannot be used|has no rows"),
        ('{{"nothing": 1}}', "."),
    ],
)
def test_of_a_file_with_a_mistake_nothing_is_noted(
    agent: Running, run: Run, tmp_path: Path, text: str, reason: str
) -> None:
    ids = [one.id for one in listed(agent.config.state_path)]
    file = tmp_path / "labels.csv"
    file.write_text(text.format(*ids))
    with pytest.raises(DataError, match=reason):
        run("label", "--file", str(file), "--state-dir", agent.config.state_dir)
    assert {one.status for one in listed(agent.config.state_path)} == {"waiting"}


def test_a_label_of_no_use_is_refused_with_the_jobs_labels_and_the_nearest(agent: Running, run: Run) -> None:
    state = ("--state-dir", agent.config.state_dir)
    name = listed(agent.config.state_path)[0].id
    with pytest.raises(DataError) as refused:
        run("label", name, "offf", *state)
    assert "'offf' is not one of the job's 2 labels" in str(refused.value)
    assert "did you mean 'off'? the job's labels: off, on" in str(refused.value)
    with pytest.raises(DataError, match="there is no sample 'xyz'"):
        run("label", "xyz", "on", *state)
    with pytest.raises(DataError, match="LABEL: is empty"):
        run("label", name, " ", *state)
    for wrong in ([], [name], [name, "on", "--file", "f.csv"]):
        with pytest.raises(DataError, match="give an ID and its LABEL"):
            run("label", *wrong, *state)


def test_a_label_is_held_against_the_task(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path, run: Run
) -> None:
    tier = msgspec.structs.replace(trainer.plan.tiers[TIER], sampling="all")
    trainer.publish_plan(task=Task.TOKEN_CLASSIFICATION, tiers={TIER: tier})
    data = write_rows(tmp_path / "train.jsonl", [{"tokens": ["turn", "on"]}])
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 1)
    state = ("--state-dir", agent.config.state_dir)
    name = listed(agent.config.state_path)[0].id
    with pytest.raises(DataError, match="1 labels for 2 words"):
        run("label", name, '["on"]', *state)
    with pytest.raises(DataError, match="is no list"):
        run("label", name, "on", *state)
    run("label", name, '["off", "on"]', *state)
    assert listed(agent.config.state_path)[0].status == "labelled"


def test_where_no_agent_has_run_that_is_said(tmp_path: Path, run: Run) -> None:
    for command in (("samples",), ("label", "x", "on")):
        with pytest.raises(StateError, match="no agent has run with this state directory"):
            run(*command, "--state-dir", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
