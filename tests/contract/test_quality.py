"""Counts of devices add up to what all samples together would have given; ratios come last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.errors import DecodeError
from sidestream.contract.quality import (
    HEADLINE,
    MEASURES,
    MOST_CONFUSED,
    Tally,
    tally_labels,
    tally_sets,
    tally_values,
    total,
)
from sidestream.contract.tasks import Task
from tests.work import work


def macro_f1(answers: list[int], targets: list[int]) -> float:
    scores = []
    for label in sorted({*answers, *targets}):
        right = sum(a == t == label for a, t in zip(answers, targets, strict=True))
        scores.append(2 * right / (answers.count(label) + targets.count(label)))
    return float(np.mean(scores))


def matthews(answers: list[int], targets: list[int], labels: int) -> float:
    """Gorodkin's R_k as a correlation of one-hot matrices."""
    x, y = np.eye(labels)[answers], np.eye(labels)[targets]
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    spread = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / spread if spread > 1e-12 else 0.0


@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40), cut=st.data()
)
def test_two_devices_labels_count_as_one_and_give_the_textbook_measures(
    pairs: list[tuple[int, int]], cut: st.DataObject
) -> None:
    answers, targets = [list(one) for one in zip(*pairs, strict=True)]
    at = cut.draw(st.integers(0, len(pairs)))
    parts = [(answers[:at], targets[:at]), (answers[at:], targets[at:])]
    counted = total(tally_labels(np.array(a, int), np.array(t, int), 4) for a, t in parts)
    assert counted == tally_labels(np.array(answers), np.array(targets), 4)
    measures = counted.measures(Task.TEXT_CLASSIFICATION)
    assert measures["accuracy"] == pytest.approx(np.mean(np.array(answers) == np.array(targets)))
    assert measures["macro_f1"] == pytest.approx(macro_f1(answers, targets))
    assert measures["matthews"] == pytest.approx(matthews(answers, targets, 4), abs=1e-9)


def test_a_label_that_the_job_does_not_have_counts_as_answered_wrongly() -> None:
    assert tally_labels(np.array([0, 1]), np.array([0, -1]), 2).measures(Task.TEXT_CLASSIFICATION)[
        "accuracy"
    ] == pytest.approx(0.5)


@pytest.mark.parametrize("task", list(Task))
def test_a_headline_alone_is_that_of_all_measures(task: Task) -> None:
    rng = np.random.default_rng(0)
    labels = tally_labels(rng.integers(3, size=20), rng.integers(3, size=20), 3)
    values = tally_values(rng.normal(size=9), rng.normal(size=9))
    tally = values if task is Task.REGRESSION else labels
    assert tally.headline(task) == tally.measures(task)[HEADLINE[task]]
    assert Tally().headline(task) is None


def test_sets_are_judged_by_label_and_as_a_whole() -> None:
    answers = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    targets = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], bool)
    foreign = np.array([False, False, True])
    measures = tally_sets(answers, targets, foreign).measures(Task.MULTI_LABEL)
    assert measures["micro_f1"] == pytest.approx(2 * 2 / (3 + 2))
    assert measures["macro_f1"] == pytest.approx((1 + 1 + 0) / 3)
    assert measures["accuracy"] == pytest.approx(1 / 3)


def test_moments_of_devices_give_the_correlation_of_all() -> None:
    rng = np.random.default_rng(0)
    truths = 1e4 + rng.standard_normal(60)
    answers = truths + rng.standard_normal(60)
    parts = total(tally_values(answers[cut], truths[cut]) for cut in (slice(0, 7), slice(7, 60)))
    measures = parts.measures(Task.REGRESSION)
    assert measures["pearson"] == pytest.approx(np.corrcoef(answers, truths)[0, 1], abs=1e-6)
    assert measures["rmse"] == pytest.approx(np.sqrt(np.mean((answers - truths) ** 2)))


@pytest.mark.parametrize("task", list(Task))
def test_nothing_judged_is_no_measure_and_the_headline_comes_first(task: Task) -> None:
    assert Tally().measures(task) == {}
    seen = {
        Task.REGRESSION: tally_values(np.array([1.0, 2.0]), np.array([1.0, 3.0])),
        Task.CAUSAL_LM: Tally(units=2, correct=1, nll=1.0),
        Task.MULTI_LABEL: tally_sets(np.ones((1, 2), bool), np.ones((1, 2), bool), np.zeros(1, bool)),
    }.get(task, tally_labels(np.array([0, 1]), np.array([0, 1]), 2))
    measures = seen.measures(task)
    assert next(iter(measures)) == HEADLINE[task] and set(measures) <= set(MEASURES)


def test_answers_that_are_all_the_same_have_no_correlation() -> None:
    assert "pearson" not in tally_values(np.ones(3), np.arange(3.0)).measures(Task.REGRESSION)
    assert tally_labels(np.zeros(3, int), np.arange(3), 3).measures(Task.TEXT_CLASSIFICATION)["matthews"] == 0


def test_tallies_of_other_labels_are_left_out_of_a_total() -> None:
    two, three = (tally_labels(np.array([0]), np.array([0]), labels) for labels in (2, 3))
    with pytest.raises(DecodeError, match="different labels"):
        two + three
    assert total([two, three, two]).units == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"right": b"1234"},
        {"right": b"123", "answered": b"123", "actual": b"123"},
        {"moments": (1.0,)},
        {"moments": (float("nan"),) * 6},
        {"units": 1, "correct": 2},
    ],
)
def test_a_tally_that_cannot_be_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(DecodeError):
        Tally(**fields)  # type: ignore[arg-type]


def test_the_pairs_confused_most_add_up_and_only_so_many_are_kept() -> None:
    one = tally_labels(np.array([1, 1, 2, 0]), np.array([0, 0, 0, 0]), 3)
    both = one + tally_labels(np.array([2, 1]), np.array([0, -1]), 3)
    assert both.confusions() == [(0, 1, 2), (0, 2, 2)], "a label that the job does not have is no pair"
    assert both.by_label()[0] == (1, 1, 5)
    answers = np.arange(1, 101)
    many = tally_labels(answers, answers - 1, 101) + tally_labels(np.array([9, 9]), np.array([8, 8]), 101)
    assert len(many.confusions()) == MOST_CONFUSED
    assert many.confusions()[0] == (8, 9, 3)


def test_confused_labels_of_another_length_are_refused() -> None:
    with pytest.raises(DecodeError, match="8 bytes each"):
        Tally(confused=b"\0" * 9)


def test_a_total_of_many_is_what_adding_one_after_another_gives() -> None:
    rng = np.random.default_rng(0)
    tallies = [tally_labels(rng.integers(4, size=50), rng.integers(-1, 4, size=50), 4) for _ in range(20)]
    one_by_one = Tally()
    for tally in tallies:
        one_by_one += tally
    assert total(tallies) == one_by_one
    moments = [tally_values(rng.normal(size=5), rng.normal(size=5)) for _ in range(20)]
    assert total(moments).moments == pytest.approx(np.sum([one.moments for one in moments], axis=0))
    assert total([]) == Tally()


def test_one_more_tally_in_a_total_takes_a_few_steps() -> None:
    tallies = [tally_labels(np.array([0, 1]), np.array([0, 0]), 2)] * 200
    few, many = (work(lambda count=count: total(tallies[:count])) for count in (100, 200))  # type: ignore[misc]
    assert many - few < 100 * 200, "of bytecode; adding up two of them takes ten times as many"
