"""Labels as they stand in the data become the job's targets, or are refused with the reason."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.batches.targets import Unusable, names_in, targets_of
from sidestream.backbone.sampled import Sampled
from sidestream.contract.tasks import TASKS, Scale, Task, check_targets, read_targets

LABELS = ("amber", "blue", "cyan")


def sampled(words: list[list[int]]) -> Sampled:
    numbers = np.concatenate([np.array(row) for row in words])
    lengths = np.array([len(row) for row in words])
    return Sampled(vectors=np.zeros((1, len(numbers), 4), np.float32), lengths=lengths, words=numbers)


@pytest.mark.parametrize(
    ("task", "texts", "labels", "wire"),
    [
        (Task.TEXT_CLASSIFICATION, ["x", "y"], ["blue", "amber"], [1, 0]),
        (
            Task.MULTI_LABEL,
            ["x", "y", "z"],
            ["blue|amber", '["cyan"]', "[]"],
            [[1, 1, 0], [0, 0, 1], [0, 0, 0]],
        ),
        (Task.REGRESSION, ["x", "y"], ["1.5", "-2"], [1.5, -2.0]),
        (Task.TOKEN_CLASSIFICATION, ["a b c", "d"], ['["blue", "amber", "cyan"]', '["blue"]'], [1, 2, 1]),
    ],
)
def test_what_travels_is_what_the_labels_say(
    task: Task, texts: list[str], labels: list[str], wire: list[object]
) -> None:
    targets = targets_of(task, LABELS if TASKS[task].named else ())
    read = [targets.read(label, text) for label, text in zip(labels, texts, strict=True)]
    of = sampled([[0, 2], [0]] if task is Task.TOKEN_CLASSIFICATION else [[0]] * len(texts))
    data = targets.pack(targets.stack(read, of))
    back = read_targets(TASKS[task].form, data, rows=len(texts), vectors=int(of.lengths.sum()))
    check_targets(TASKS[task].form, back, len(LABELS))
    assert back[..., :3].tolist() == wire if task is Task.MULTI_LABEL else back.tolist() == wire


@pytest.mark.parametrize(
    ("task", "label", "reason"),
    [
        (Task.TEXT_CLASSIFICATION, "dun", "not one of the job's 3 labels"),
        (Task.TEXT_CLASSIFICATION, '["blue"]', "is a list; this job has one label a sample"),
        (Task.MULTI_LABEL, "blue|dun", "'dun' is not one of the job's 3 labels"),
        (Task.MULTI_LABEL, "[1]", "no list of names"),
        (Task.MULTI_LABEL, "[blue", "no list"),
        (Task.MULTI_LABEL, "[" * 100_000, "no list"),
        (Task.REGRESSION, "many", "is no number"),
        (Task.REGRESSION, "nan", "no finite number"),
        (Task.REGRESSION, "1e39", "no finite number"),
        (Task.TOKEN_CLASSIFICATION, '["blue"]', "1 labels for 2 words"),
        (Task.TOKEN_CLASSIFICATION, "blue", "is no list"),
    ],
)
def test_a_label_of_no_use_is_refused_with_the_reason(task: Task, label: str, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        targets_of(task, LABELS).read(label, "two words")


@given(label=st.text(max_size=30), task=st.sampled_from(list({*Task} - {Task.CAUSAL_LM})))
def test_any_label_is_read_or_refused(label: str, task: Task) -> None:
    names_in(task, label)
    with suppress(Unusable):
        targets_of(task, LABELS).read(label, "two words", judge=True)


def test_names_are_found_in_every_form() -> None:
    assert names_in(Task.TEXT_CLASSIFICATION, "a|b") == ("a|b",)
    assert list(names_in(Task.MULTI_LABEL, "a | b|")) == ["a", "b"]
    assert list(names_in(Task.TOKEN_CLASSIFICATION, json.dumps(["a", "b"]))) == ["a", "b"]
    assert names_in(Task.REGRESSION, "3") == () and names_in(Task.TOKEN_CLASSIFICATION, "no list") == ()


def test_names_that_the_job_does_not_have_are_judged_as_answered_wrongly() -> None:
    for task, labels, answers in (
        (Task.TEXT_CLASSIFICATION, ["blue", "dun"], [[0.0, 1, 0], [0, 1, 0]]),
        (Task.MULTI_LABEL, ["blue", "blue|dun"], [[-1.0, 1, -1], [-1, 1, -1]]),
    ):
        targets = targets_of(task, LABELS)
        stacked = np.stack([targets.read(label, "x", judge=True) for label in labels])
        tally = targets.tally(np.array(answers, np.float32), stacked, Scale())
        assert (tally.units, tally.correct) == (2, 1)


def test_numbers_are_judged_in_their_own_measure() -> None:
    targets = targets_of(Task.REGRESSION, ())
    stacked = np.array([10.0, 14.0], np.float32)
    answers = np.array([[-1.0], [1.0]], np.float32)
    tally = targets.tally(answers, stacked, Scale(mean=12, deviation=2))
    assert tally.measures(Task.REGRESSION)["rmse"] == pytest.approx(0.0)
