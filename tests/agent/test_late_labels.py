"""A sample without a label is forwarded once and waits; once its label comes it is trained as any other."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from broker_config.testing.inprocess import InProcessBroker
from sidestream.backbone.backbone import Backbone
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.sampling import Rung
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec, decode
from tests.agent.fake_trainer import LABELS, TIER, FakeTrainer
from tests.agent.fleet import Running, sentence, write_samples
from tests.agent.late import give, listed, tables, write_rows, write_unlabelled
from tests.contract.examples import SCALAR
from tests.until import until


def vectors(trainer: FakeTrainer) -> dict[bytes, Any]:
    """Every trained row: its decoded activations, and its target."""
    found: dict[bytes, Any] = {}
    for batch in trainer.journal.values():
        ends = np.cumsum(batch.row_lengths)
        values, targets = decode(batch.activations), batch.read_targets()
        for row, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            of = targets[start:end] if len(targets) != len(ends) else targets[row]
            found[values[:, start:end].tobytes()] = np.asarray(of).tolist()
    return found


@pytest.fixture
def counted(bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each forward pass took."""
    sizes: list[int] = []
    forward = bert.forward

    def counting(texts: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(texts))
        return forward(texts, *args, **kwargs)

    monkeypatch.setattr(bert, "forward", counting)
    return sizes


@pytest.mark.slow
def test_labels_that_come_later_train_what_was_forwarded_once(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path, counted: list[int]
) -> None:
    data = write_unlabelled(tmp_path / "train.jsonl", 12)
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 12)
        assert trainer.rows() == 0 and sum(counted) == 12
        give(agent.config.state_path, {sentence(number): LABELS[number % 2] for number in range(8)})
        trainer.wait(lambda t: t.rows() == 8)
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 4)
    told = trainer.telemetry["pi-1"]
    assert sum(counted) == 12, "no second forward pass"
    assert (told.samples_read, told.samples_unlabelled, told.samples_forwarded) == (12, 12, 8)
    assert told.samples_skipped == 0 and told.unlabelled_dropped == 0
    assert [one.status for one in listed(agent.config.state_path)].count("sent") == 8
    assert tables(agent.config.state_path) == (4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("codec", SCALAR)
@pytest.mark.parametrize("sampling", ["segments:2", "all"])
def test_what_travels_late_is_what_would_have_travelled_at_once(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    codec: Codec,
    sampling: str,
) -> None:
    """A batch of one sample: in larger ones, blocks of 64 values reach over rows of this width."""
    tier = msgspec.structs.replace(
        trainer.plan.tiers[TIER], codec=codec, sampling=sampling, batch_size=1 if sampling == "all" else 4
    )
    trainer.publish_plan(tiers={TIER: tier})
    texts = [f"turn the lights on now {number}" for number in range(6)]
    rows = [{"text": text, "label": LABELS[at % 2]} for at, text in enumerate(texts)]
    data = write_rows(tmp_path / "labelled.jsonl", rows)
    with Running(broker, bert, tmp_path, device="early", data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 6)
    early = vectors(trainer)
    trainer.journal.clear()
    bare = write_rows(tmp_path / "bare.jsonl", [{"text": text} for text in texts])
    with Running(broker, bert, tmp_path, device="late", data={"path": str(bare)}) as agent:
        trainer.wait(lambda t: t.telemetry["late"].unlabelled_waiting == 6)
        give(agent.config.state_path, {row["text"]: row["label"] for row in rows})
        trainer.wait(lambda t: t.rows() == 6)
    assert vectors(trainer) == early
    if sampling != "all":
        assert len(trainer.journal) == 2, "they share messages"


@pytest.mark.slow
def test_a_label_that_comes_while_the_agent_is_stopped_is_trained_when_it_starts(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path, counted: list[int]
) -> None:
    data = write_unlabelled(tmp_path / "train.jsonl", 5)
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 5)
    give(agent.config.state_path, {sentence(2): "off"})
    give(agent.config.state_path, {sentence(2): "on"})
    trainer.publish_weights(4, favour=1, final=True)
    held = write_samples(tmp_path / "eval.jsonl", 3, start=90)
    settings = {"path": str(data), "evaluation_path": str(held)}
    with Running(broker, bert, tmp_path, data=settings, exit_when_done=True) as agent:
        trainer.wait(lambda t: t.rows() == 1)
        trainer.publish_weights(5, favour=1, final=True)
        assert agent.join() == 0
    assert list(vectors(trainer).values()) == [LABELS.index("on")], "the last label counts"
    assert sum(counted) == 5 + 3


@pytest.mark.slow
def test_a_held_out_sample_waits_for_its_label_and_then_measures(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    data = write_unlabelled(tmp_path / "train.jsonl", 40)
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data), "held_out_share": 0.3}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 40)
        state = agent.config.state_path
        held = [one for one in listed(state) if one.held_out]
        assert 3 <= len(held) <= 25 and not trainer.telemetry["pi-1"].samples_held_out
        give(state, {one.row.text: "on" for one in listed(state)})
        trainer.wait(lambda t: t.rows() == 40 - len(held))
        until(lambda: [one.status for one in listed(state)].count("evaluation") == len(held))
        trainer.publish_weights(2, favour=1, final=True)
        trainer.wait(lambda t: t.telemetry["pi-1"].accuracy is not None)
    told = trainer.telemetry["pi-1"]
    assert told.accuracy == 1.0 and told.evaluation_samples == len(held)
    assert told.samples_forwarded == 40 - len(held) == trainer.rows()
    assert told.samples_held_out == len(held) == told.samples_read - told.samples_forwarded


@pytest.mark.slow
def test_a_label_that_is_none_of_the_jobs_is_refused_and_another_one_may_come(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_unlabelled(tmp_path / "train.jsonl", 3)
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 3)
        state = agent.config.state_path
        give(state, {sentence(0): "dim", sentence(1): "on"})
        trainer.wait(lambda t: t.rows() == 1)
        until(lambda: listed(state)[0].status == "refused")
        assert "'dim' is not one of the job's 2 labels" in listed(state)[0].reason
        give(state, {sentence(0): "off"})
        trainer.wait(lambda t: t.rows() == 2)
    assert "waits for another: label 'dim'" in caplog.text


TASKS: dict[str, tuple[Task, tuple[str, ...], list[dict[str, Any]], list[str], list[Any]]] = {
    "multi-label": (
        Task.MULTI_LABEL,
        LABELS,
        [{"text": "turn the lights on"}, {"text": "heat up now"}],
        ['["on", "off"]', "[]"],
        [[True, True], [False, False]],
    ),
    "regression": (
        Task.REGRESSION,
        (),
        [{"text": "turn the lights on"}, {"text": "heat up now"}],
        ["-1.5", "2"],
        [-1.5, 2.0],
    ),
    "token classification": (
        Task.TOKEN_CLASSIFICATION,
        LABELS,
        [{"tokens": ["turn", "the", "lights"]}, {"tokens": ["heat", "up"]}],
        ['["off", "on", "on"]', '["on", "off"]'],
        [[0, 1, 1], [1, 0]],
    ),
    "pairs": (
        Task.TEXT_CLASSIFICATION,
        LABELS,
        [{"text": "turn on", "text_pair": "heat up"}, {"text": "turn off", "text_pair": "heat up"}],
        ["on", "off"],
        [1, 0],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
def test_labels_may_come_late_in_every_task(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path, task: str
) -> None:
    kind, names, rows, labels, targets = TASKS[task]
    sampling = "all" if kind is Task.TOKEN_CLASSIFICATION else "segments:2"
    tier = msgspec.structs.replace(trainer.plan.tiers[TIER], sampling=sampling)
    trainer.publish_plan(task=kind, labels=names, tiers={TIER: tier})
    data = write_rows(tmp_path / "train.jsonl", rows)
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 2)
        texts = [row.get("text") or " ".join(row["tokens"]) for row in rows]
        give(agent.config.state_path, dict(zip(texts, labels, strict=True)))
        trainer.wait(lambda t: t.rows() == 2)
    found = list(vectors(trainer).values())
    if kind is Task.MULTI_LABEL:
        found = [one[:2] for one in found]
    assert sorted(found) == sorted(targets)


@pytest.mark.slow
def test_the_oldest_are_dropped_where_there_is_no_room(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [{"text": sentence(number) + " the" * 40} for number in range(300)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    tier = msgspec.structs.replace(trainer.plan.tiers[TIER], sampling="all", codec=Codec.F32)
    trainer.publish_plan(tiers={TIER: tier})
    with Running(broker, bert, tmp_path, data={"path": str(data)}, unlabelled_max_mib=1) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].finished)
        trainer.wait(lambda t: t.telemetry["pi-1"].samples_unlabelled == 300)
    told = trainer.telemetry["pi-1"]
    assert 0 < told.unlabelled_waiting < 120 and told.unlabelled_waiting + told.unlabelled_dropped == 300
    left = [one.row.text for one in listed(agent.config.state_path)]
    assert rows[0]["text"] not in left and len(left) == told.unlabelled_waiting
    assert "dropped: unlabelled_max_mib is 1" in caplog.text


def test_without_room_samples_without_a_label_are_skipped(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    data = write_unlabelled(tmp_path / "train.jsonl", 3)
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}, unlabelled_max_mib=0):
        trainer.wait(lambda t: t.telemetry["pi-1"].finished)
    told = trainer.telemetry["pi-1"]
    assert (told.samples_skipped, told.samples_unlabelled) == (3, 0)


@pytest.mark.slow
def test_other_taps_have_the_samples_computed_anew(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    counted: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_unlabelled(tmp_path / "train.jsonl", 6)
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 6)
    give(agent.config.state_path, {sentence(0): "on"})
    tier = msgspec.structs.replace(trainer.plan.tiers[TIER], taps=(1, 3))
    trainer.publish_plan(revision=2, tiers={TIER: tier})
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 1)
    assert sum(counted) == 12 and "6 samples that wait for a label are computed anew" in caplog.text
    assert [batch.taps for batch in trainer.journal.values()] == [(1, 3)]
    told = trainer.telemetry["pi-1"]
    assert (told.samples_read, told.samples_unlabelled, told.samples_forwarded) == (6, 6, 1)


@pytest.mark.slow
def test_a_new_journal_of_the_trainer_gets_what_was_labelled_late_too(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    data = write_unlabelled(tmp_path / "train.jsonl", 6)
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 6)
        ids = {one.row.text: one.id for one in listed(agent.config.state_path)}
        give(agent.config.state_path, {sentence(0): "on", sentence(1): "off"})
        trainer.wait(lambda t: t.rows() == 2)
        trainer.journal.clear()
        trainer.publish_plan(run="cd" * 16)
        trainer.wait(lambda t: t.rows() == 2)
        until(lambda: {one.row.text: one.id for one in listed(agent.config.state_path)} == ids)
    assert sorted(vectors(trainer).values()) == [0, 1]


@pytest.mark.slow
def test_a_full_outbox_keeps_labels_waiting(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    data = write_unlabelled(tmp_path / "train.jsonl", 8)
    trainer.publish_plan()
    trainer.publish_flow(pause=True)
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 8)
        give(agent.config.state_path, {sentence(number): "on" for number in range(8)})
        trainer.wait(lambda t: t.telemetry["pi-1"].outbox_batches == 2)
        assert trainer.rows() == 0
        trainer.publish_flow()
        trainer.wait(lambda t: t.rows() == 8)


@pytest.mark.slow
def test_each_policy_of_a_ladder_has_messages_of_its_own(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    ladder = (Rung(sampling="segments:2", codec=Codec.INT8), Rung(sampling="mean", codec=Codec.INT8))
    tier = msgspec.structs.replace(trainer.plan.tiers[TIER], ladder=ladder, batch_size=8)
    trainer.publish_plan(tiers={TIER: tier})
    data = write_unlabelled(tmp_path / "train.jsonl", 80)
    with Running(broker, bert, tmp_path, data={"path": str(data)}, bytes_per_sample=180) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].unlabelled_waiting == 80)
        give(agent.config.state_path, {sentence(number): "on" for number in range(80)})
        trainer.wait(lambda t: t.rows() == 80)
    batches: list[ActivationBatch] = list(trainer.journal.values())
    assert {batch.sampling for batch in batches} == {"segments:2", "mean"}
    assert all((batch.row_lengths == 1).all() for batch in batches if batch.sampling == "mean")
    payload = sum(len(msgspec.msgpack.encode(batch)) for batch in batches)
    assert payload / 80 <= 180 * 1.05


def test_the_progress_line_says_how_many_wait(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_unlabelled(tmp_path / "train.jsonl", 7)
    trainer.publish_plan()
    with (
        caplog.at_level(logging.INFO, "edge_agent"),
        Running(broker, bert, tmp_path, data={"path": str(data)}),
    ):
        trainer.wait(lambda t: t.telemetry["pi-1"].finished)
    assert "7 wait for a label" in caplog.text
    assert caplog.text.count("has no 'label' (it has: text); such rows wait for a label") == 1
    assert json.dumps(sentence(0))[1:-1] not in caplog.text, "and quotes none"
