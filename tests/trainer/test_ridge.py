"""The closed-form linear answer: what it says of a row left out is what a fit without the row would say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from side_trainer.side_tuning.ridge import Ridge, calibrated, ridge


def rows(count: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    centres = torch.randn(3, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return centres[targets] + noise * 1.5, targets


def fitted(features: Tensor, targets: Tensor, weights: Tensor | None = None) -> Ridge:
    given = torch.ones(len(targets), dtype=torch.float64) if weights is None else weights
    return ridge(features, targets, given, labels=3)


@pytest.mark.parametrize(("count", "features"), [(30, 8), (12, 40), (600, 20)])
def test_what_is_said_of_a_row_left_out_is_what_a_fit_without_it_says(
    count: int, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the strength held, and in the same measure, for it is chosen by all rows."""
    monkeypatch.setattr("side_trainer.side_tuning.ridge.STRENGTHS", (0.3,))
    values, targets = rows(count, features)
    unseen = fitted(values, targets).unseen
    monkeypatch.setattr("side_trainer.side_tuning.ridge._Problem.size", property(lambda _: _size(values)))
    for row in (0, count // 2, count - 1):
        others = torch.arange(count) != row
        without = fitted(values[others], targets[others])
        torch.testing.assert_close(
            unseen[row], values[row] @ without.weight + without.bias, rtol=0.02, atol=0.02
        )


def _size(values: Tensor) -> float:
    return float((values - values.mean(dim=0)).square().sum() / len(values))


def test_the_strength_goes_by_rows_left_out_and_not_by_those_it_fits() -> None:
    """Forty features explain twelve rows of noise wholly; a row left out tells that they explain nothing."""
    generator = torch.Generator().manual_seed(3)
    noise, targets = torch.randn(12, 40, generator=generator, dtype=torch.float64), torch.arange(12) % 3
    said = fitted(noise, targets)
    assert (said.unseen - 1 / 3).abs().max() < 0.5 and (noise @ said.weight).abs().max() < 0.9
    values, targets = rows(60, 40)
    assert (fitted(values, targets).unseen.argmax(dim=1) == targets).double().mean() > 0.8


def test_rows_that_count_twice_are_as_good_as_two() -> None:
    values, targets = rows(30, 8)
    weights = torch.ones(30, dtype=torch.float64)
    weights[:10] = 2
    doubled = fitted(torch.cat([values, values[:10]]), torch.cat([targets, targets[:10]]))
    found = fitted(values, targets, weights)
    assert (
        (values @ found.weight + found.bias)
        .argmax(1)
        .eq((values @ doubled.weight + doubled.bias).argmax(1))
        .all()
    )


def test_what_is_said_already_is_only_added_to_where_that_helps() -> None:
    values, targets = rows(60, 8)
    right = torch.nn.functional.one_hot(targets, 3).double()
    weights = torch.ones(60, dtype=torch.float64)
    found = ridge(values, targets, weights, 3, before=right)
    assert not found.weight.any() and not found.bias.any() and found.unseen.equal(right)
    wrong = torch.zeros_like(right)
    assert ridge(values, targets, weights, 3, before=wrong).weight.any()


def test_nothing_is_said_of_a_label_without_rows() -> None:
    values, targets = rows(30, 8)
    found = ridge(values, targets, torch.ones(30, dtype=torch.float64), labels=5)
    assert not found.weight[:, 3:].any() and not found.bias[3:].any()


def test_sure_answers_get_a_higher_temperature() -> None:
    targets = torch.arange(30) % 3
    sure = torch.nn.functional.one_hot(targets, 3).double()
    unsure = sure + torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.ones(30, dtype=torch.float64)
    (hot, little), (cold, much) = (calibrated(one, targets, weights) for one in (sure, unsure))
    assert hot > cold and little < 0.01 < much
