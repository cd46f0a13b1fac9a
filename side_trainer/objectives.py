"""What each task's answers are worth: losses, and the label statistics that the prior correction goes by.

Knows nothing of records, tiers or optimisers; :mod:`side_trainer.fold` asks.

Legend: K rows, C outputs of the side-network, which are the labels.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional

from contract.tasks import Task

Counts = npt.NDArray[np.float64]


class Objective(Protocol):
    """One task's losses."""

    def no_counts(self, labels: int) -> Counts:
        """The statistics of no targets at all."""

    def count(self, targets: npt.NDArray[Any], labels: int) -> Counts:
        """Statistics of some targets; those of two batches add up."""

    def prior(self, counts: Counts) -> npt.NDArray[np.float64]:
        """[C]: what answers lean by where targets have such statistics, to be added to them."""

    def losses(self, answers: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """[K]: how far each row's answers are from its targets."""

    def distilled(self, answers: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """[K]: how far each row's answers are from better ones, which learn nothing by it."""


class Classification(Objective):
    """One of C labels a row: cross-entropy. Statistics are how often each label occurred."""

    def no_counts(self, labels: int) -> Counts:
        return np.zeros(labels)

    def count(self, targets: npt.NDArray[Any], labels: int) -> Counts:
        return np.bincount(targets, minlength=labels).astype(np.float64)

    def prior(self, counts: Counts) -> npt.NDArray[np.float64]:
        smoothed = counts + 1.0
        shares: npt.NDArray[np.float64] = np.log(smoothed / smoothed.sum())
        return shares

    def losses(self, answers: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        return functional.cross_entropy(answers, targets, reduction="none", label_smoothing=smoothing)

    def distilled(self, answers: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(answers, teacher.detach().softmax(dim=-1), reduction="none")


class NextToken(Objective):
    """The token that follows. Without statistics, so without a prior; see :mod:`side_trainer.token_loss`."""

    def no_counts(self, labels: int) -> Counts:
        return np.zeros(0)

    def count(self, targets: npt.NDArray[Any], labels: int) -> Counts:
        return np.zeros(0)

    def prior(self, counts: Counts) -> npt.NDArray[np.float64]:
        return np.zeros(0)

    def losses(self, answers: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        raise AssertionError("a language model's answers are never all there at once")

    def distilled(self, answers: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("a language model's answers are never all there at once")


OBJECTIVES: Final[dict[Task, Objective]] = {
    Task.TEXT_CLASSIFICATION: Classification(),
    Task.CAUSAL_LM: NextToken(),
}
if set(OBJECTIVES) != set(Task):  # pragma: no cover
    raise AssertionError("every Task needs an entry in OBJECTIVES")
