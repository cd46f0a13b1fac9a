"""Views: which rows teach an answer, what it is adjusted by, and which answer is trusted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from side_trainer.side_tuning.objectives import OBJECTIVES
from side_trainer.side_tuning.views import Anchor, Tapped, Views
from sidestream.contract.tasks import Task

LABELS = OBJECTIVES[Task.TEXT_CLASSIFICATION]
TIERS = {
    "full": Tapped("m", (1, 3, 6)),
    "first4": Tapped("m", (1, 3, 4)),
    "first3": Tapped("m", (1, 3)),
    "other": Tapped("n", (1, 3)),
}


def views(**counts: tuple[int, int]) -> Views:
    given_counts = {name: np.array(counts.get(name, (50, 50)), float) for name in TIERS}
    return Views(TIERS, given_counts, LABELS, 1.0)


def test_a_view_is_taught_by_every_tier_that_shows_the_same_layers_there() -> None:
    seen = views(full=(1, 99), first4=(90, 10), first3=(7, 8))
    assert seen.counts("first3", 2).tolist() == seen.counts("full", 2).tolist() == [98, 117]
    assert seen.counts("full", 3).tolist() == [1, 99]
    assert seen.counts("other", 2).tolist() == [50, 50]


def test_a_tier_short_of_a_label_is_anchored_where_all_rows_teach() -> None:
    seen = views(full=(1, 199), first4=(100, 100), first3=(150, 2))
    everything = np.array([251.0, 301.0])
    taps, share = seen.anchor("full", {2, 3}, everything)
    assert taps == 2 and share < 0.3
    assert seen.anchor("first4", {2, 3}, everything).share > 0.95
    assert seen.anchor("first3", {2, 3}, everything) == Anchor(2, 1.0)
    assert seen.anchor("other", {2, 3}, everything) == Anchor(2, 1.0)


def test_mild_skew_costs_next_to_nothing_and_a_missing_label_does() -> None:
    everything = np.array([200.0, 200.0])
    assert views(full=(30, 70)).anchor("full", {2, 3}, everything).share > 0.99
    assert views(full=(0, 1000)).anchor("full", {2, 3}, everything).share < 0.3


def test_with_equal_labels_everywhere_every_tier_is_its_own_anchor() -> None:
    seen = views()
    for tier, (_, taps) in TIERS.items():
        assert seen.anchor(tier, {2, 3}, np.array([200.0, 200.0])) == Anchor(len(taps), 1.0)


def test_an_answer_that_nothing_teaches_is_no_anchor() -> None:
    alone = Views({"a": Tapped("m", (1, 3))}, {"a": np.array([0.0, 9.0])}, LABELS, 0.0)
    assert alone.anchor("a", {1, 2}, np.array([9.0, 9.0])) == Anchor(2, 1.0)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=6), st.sampled_from(list(OBJECTIVES)))
def test_divergence_is_nothing_between_equals_and_never_negative(numbers: list[int], task: Task) -> None:
    objective = OBJECTIVES[task]
    targets = {
        Task.MULTI_LABEL: np.eye(len(numbers), dtype=np.float32)[: len(numbers)],
        Task.REGRESSION: np.array(numbers, np.float32),
    }.get(task, np.repeat(np.arange(len(numbers)), numbers))
    counts = objective.count(targets, len(numbers))
    none = objective.no_counts(len(numbers))
    assert objective.divergence(counts, counts) == pytest.approx(0, abs=1e-9)
    assert objective.divergence(counts, none) >= -1e-9 and objective.divergence(none, counts) >= -1e-9


@pytest.mark.parametrize("task", [Task.TEXT_CLASSIFICATION, Task.TOKEN_CLASSIFICATION, Task.MULTI_LABEL])
def test_smoothing_towards_no_lean_is_smoothing_towards_no_opinion(task: Task) -> None:
    answers = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 2, 3])
    if task is Task.TOKEN_CLASSIFICATION:
        answers, targets = answers[None], torch.tensor([[0, 2, -100]])
    if task is Task.MULTI_LABEL:
        targets = torch.eye(4)[:3]
    objective = OBJECTIVES[task]
    plain = {
        Task.TEXT_CLASSIFICATION: lambda: functional.cross_entropy(
            answers, targets, reduction="none", label_smoothing=0.1
        ),
        Task.TOKEN_CLASSIFICATION: lambda: functional.cross_entropy(
            answers[0], targets[0], label_smoothing=0.1
        )[None],
        Task.MULTI_LABEL: lambda: functional.binary_cross_entropy_with_logits(
            answers, targets * 0.9 + 0.05, reduction="none"
        ).mean(dim=1),
    }
    torch.testing.assert_close(
        objective.losses(answers, targets, 0.1, torch.zeros_like(answers)), plain[task]()
    )


def test_smoothing_does_not_teach_the_opposite_of_a_correction() -> None:
    """Of a tier with one label only, a row with that label says nothing against it."""
    adjustment = torch.tensor([[-6.0, 0.0]])
    sure = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = LABELS.losses(sure + adjustment, torch.tensor([1]), 0.1, adjustment).sum()
    (gradient,) = torch.autograd.grad(loss, sure)
    assert gradient.abs().max() < 1e-2
    plain = functional.cross_entropy(sure + adjustment, torch.tensor([1]), label_smoothing=0.1)
    assert torch.autograd.grad(plain, sure)[0][0, 1] > 0.04  # it would push towards the other label
