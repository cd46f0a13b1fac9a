"""A linear answer in closed form: ridge regression of one-hot labels, as strong as rows left out ask for.

What a fit that has not seen a row says of it is known without a second fit (the residual over one less the
row's leverage), so strength and temperature are chosen by the loss of such answers: nothing has to be held
out, and ten rows are enough. A strong ridge answers by class means, a weak one by least squares. Pure, and
the same bits for the same rows with the same number of threads.

Legend: N rows, F features, C labels.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

STRENGTHS: Final[tuple[float, ...]] = tuple(10.0 ** (power / 2) for power in range(-7, 8))
"""Of the ridge, in mean squared lengths of a row."""
TEMPERATURES: Final = tuple(2.0 * 1.5**step for step in range(11))
"""What the answers, shares of one, are multiplied by to be logits."""
CHOSEN_BY: Final = 384
"""Rows that the strength is chosen by: the first ones."""


class Ridge(NamedTuple):
    """A linear answer, in shares of one, and what it said of the rows it was fitted to."""

    weight: Tensor
    """[F, C]"""
    bias: Tensor
    """[C]"""
    unseen: Tensor
    """[N, C]: what a fit without the row says of it."""


class _Problem(NamedTuple):
    """Rows made ready."""

    rows: Tensor
    """[N, F], centred, times the roots of their weights."""
    wanted: Tensor
    """[N, C], likewise."""
    weights: Tensor
    """[N], one in the mean."""
    centre: Tensor
    """[F]"""
    mean: Tensor
    """[C]"""

    @classmethod
    def of(cls, features: Tensor, wanted: Tensor, given: Tensor) -> _Problem:
        weights = given / given.mean()
        roots = weights.sqrt()[:, None]
        centre, mean = (weights[:, None] * features).mean(dim=0), (weights[:, None] * wanted).mean(dim=0)
        return cls((features - centre) * roots, (wanted - mean) * roots, weights, centre, mean)

    @property
    def size(self) -> float:
        """A row's mean squared length."""
        return max(float(self.rows.square().sum()) / len(self.rows), 1e-12)


def ridge(
    features: Tensor, targets: Tensor, weights: Tensor, labels: int, before: Tensor | None = None
) -> Ridge:
    """Fit, and choose how.

    Args:
        features: [N, F] float64, in random order.
        targets: [N].
        weights: [N], above 0: what each row counts.
        labels: C.
        before: [N, C]: what is said of the rows already, without having seen them. What is fitted is added to
            it, or nothing is.
    """
    one_hot = torch.nn.functional.one_hot(targets, labels).to(features.dtype)
    start = torch.zeros_like(one_hot) if before is None else before
    wanted = (one_hot - start) * (one_hot.sum(dim=0) > 0)  # of a label without rows nothing is known
    few = slice(0, CHOSEN_BY)
    rows = (features[few], targets[few], weights[few], wanted[few], start[few])
    strength = _choose(*rows, nothing=before is not None)
    if not strength:  # nothing that could be added would help
        return Ridge(features.new_zeros(features.shape[1], labels), features.new_zeros(labels), start)
    problem = _Problem.of(features, wanted, weights)
    slopes, leverage = _solved(problem, strength * problem.size)
    bias = problem.mean - problem.centre @ slopes
    said = features @ slopes + bias
    return Ridge(slopes, bias, start + _without_itself(said, wanted, leverage))


def calibrated(unseen: Tensor, targets: Tensor, weights: Tensor) -> tuple[float, float]:
    """What answers are to be multiplied by to be logits, and their loss then, in nats a row."""
    losses = torch.stack(_losses(unseen, targets, weights))
    best = int(losses.argmin())
    return TEMPERATURES[best], float(losses[best])


def _choose(
    features: Tensor, targets: Tensor, weights: Tensor, wanted: Tensor, start: Tensor, *, nothing: bool
) -> float:
    """The strength with the least loss on rows left out; 0 if, where that is allowed, nothing is better."""
    problem = _Problem.of(features, wanted, weights)
    values, vectors = torch.linalg.eigh(problem.rows @ problem.rows.T)
    values, turned = values.clamp(min=0), vectors.T @ problem.wanted
    losses: list[Tensor] = []
    for strength in STRENGTHS:
        shares = values / (values + strength * problem.size)
        said = vectors @ (shares[:, None] * turned) / problem.weights.sqrt()[:, None] + problem.mean
        leverage = vectors.square() @ shares + problem.weights / len(shares)
        unseen = start + _without_itself(said, wanted, leverage)
        losses.append(torch.stack(_losses(unseen, targets, weights)).min())
    if nothing:
        losses.append(torch.stack(_losses(start, targets, weights)).min())
    best = int(torch.stack(losses).argmin())
    return STRENGTHS[best] if best < len(STRENGTHS) else 0.0


def _losses(unseen: Tensor, targets: Tensor, weights: Tensor) -> list[Tensor]:
    """The mean cross-entropy at each temperature."""
    shares = weights / weights.sum()
    return [
        shares @ torch.nn.functional.cross_entropy(unseen * one, targets, reduction="none")
        for one in TEMPERATURES
    ]


def _solved(problem: _Problem, strength: float) -> tuple[Tensor, Tensor]:
    """Slopes [F, C] and the rows' leverages [N], in the smaller of the two spaces."""
    rows = problem.rows
    few = len(rows) < rows.shape[1]
    gram = rows @ rows.T if few else rows.T @ rows
    gram.diagonal().add_(strength)
    root = torch.linalg.cholesky(gram)
    if few:
        slopes = rows.T @ torch.cholesky_solve(problem.wanted, root)
        # K(K + s)⁻¹ = 1 − s(K + s)⁻¹
        leverage = 1 - strength * torch.cholesky_inverse(root).diagonal()
    else:
        slopes = torch.cholesky_solve(rows.T @ problem.wanted, root)
        leverage = torch.linalg.solve_triangular(root, rows.T, upper=False).square().sum(dim=0)
    return slopes, leverage + problem.weights / len(rows)


def _without_itself(said: Tensor, wanted: Tensor, leverage: Tensor) -> Tensor:
    """What would have been said of each row without it."""
    kept = leverage[:, None]
    return (said - kept * wanted) / (1 - kept).clamp(min=1e-3)
