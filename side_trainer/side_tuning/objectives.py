"""What each task's answers are worth: losses, and the label statistics that the prior correction goes by.

Knows nothing of records, tiers or optimisers; :mod:`side_trainer.side_tuning.batch_loss` asks.

Legend: K rows, N vectors a row (padded), C outputs of the side-network: its labels, or one number.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional

from sidestream.contract.tasks import NO_TARGET, Scale, Task

Counts = npt.NDArray[np.float64]
_LEAST: Final = 1e-6


class Objective(Protocol):
    """One task's losses."""

    def no_counts(self, labels: int) -> Counts:
        """The statistics of no targets at all."""

    def count(self, targets: npt.NDArray[Any], labels: int) -> Counts:
        """Statistics of some targets; those of two batches add up."""

    def prior(self, counts: Counts) -> npt.NDArray[np.float64]:
        """[C]: what answers are adjusted by where targets have such statistics, to be added to them."""

    def scale(self, counts: Counts) -> Scale:
        """What answers are measured in, where targets have such statistics."""
        return Scale()

    def divergence(self, wanted: Counts, counts: Counts) -> float:
        """How far targets with the statistics ``counts`` are from ``wanted`` ones: 0 if alike, in nats."""
        return 0.0

    def losses(self, answers: Tensor, targets: Tensor, smoothing: float, adjustment: Tensor) -> Tensor:
        """[K]: how far each row's answers are from its targets, which are in the answers' measure.

        ``adjustment`` is what the prior correction added to the answers: smoothing then goes towards that,
        and not towards no opinion. Otherwise it would teach the opposite of a correction.
        """

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

    def divergence(self, wanted: Counts, counts: Counts) -> float:
        log = self.prior(wanted)
        return float(np.exp(log) @ (log - self.prior(counts)))

    def losses(self, answers: Tensor, targets: Tensor, smoothing: float, adjustment: Tensor) -> Tensor:
        return _smoothed(answers, targets, smoothing, adjustment)

    def distilled(self, answers: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(answers, teacher.detach().softmax(dim=-1), reduction="none")


class NextToken(Objective):
    """The token that follows. Without statistics, so without a prior; see :mod:`.token_loss`."""

    def no_counts(self, labels: int) -> Counts:
        return np.zeros(0)

    def count(self, targets: npt.NDArray[Any], labels: int) -> Counts:
        return np.zeros(0)

    def prior(self, counts: Counts) -> npt.NDArray[np.float64]:
        return np.zeros(0)

    def losses(self, answers: Tensor, targets: Tensor, smoothing: float, adjustment: Tensor) -> Tensor:
        raise AssertionError("a language model's answers are never all there at once")

    def distilled(self, answers: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("a language model's answers are never all there at once")


class TokenClassification(Classification):
    """One of C labels a vector: its mean cross-entropy over a row's vectors. Statistics are of vectors."""

    def losses(self, answers: Tensor, targets: Tensor, smoothing: float, adjustment: Tensor) -> Tensor:
        return _mean_of_real(_smoothed(answers, targets.clamp(min=0), smoothing, adjustment), targets)

    def distilled(self, answers: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        shares = teacher.detach().softmax(dim=-1).transpose(1, 2)
        by_vector = functional.cross_entropy(answers.transpose(1, 2), shares, reduction="none")
        return _mean_of_real(by_vector, targets)


class MultiLabel(Objective):
    """Any of C labels a row: mean binary cross-entropy over them.

    Statistics are how often each label was there, and how many rows there were; the prior is each label's log
    odds.
    """

    def no_counts(self, labels: int) -> Counts:
        return np.zeros(labels + 1)

    def count(self, targets: npt.NDArray[Any], labels: int) -> Counts:
        return np.append(targets[:, :labels].sum(axis=0), len(targets)).astype(np.float64)

    def prior(self, counts: Counts) -> npt.NDArray[np.float64]:
        there, rows = counts[:-1], counts[-1]
        odds: npt.NDArray[np.float64] = np.log((there + 1.0) / (rows - there + 1.0))
        return odds

    def divergence(self, wanted: Counts, counts: Counts) -> float:
        odds, own = self.prior(wanted), self.prior(counts)
        share = 1 / (1 + np.exp(-odds))
        # log σ(a) − log σ(b) = softplus(−b) − softplus(−a), and alike for the labels that are not there.
        there = np.logaddexp(0, -own) - np.logaddexp(0, -odds)
        absent = np.logaddexp(0, own) - np.logaddexp(0, odds)
        return float((share * there + (1 - share) * absent).mean())

    def losses(self, answers: Tensor, targets: Tensor, smoothing: float, adjustment: Tensor) -> Tensor:
        wanted = targets[:, : answers.shape[1]] * (1 - smoothing) + smoothing * adjustment.sigmoid()
        return _binary(answers, wanted)

    def distilled(self, answers: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return _binary(answers, teacher.detach().sigmoid())


class Regression(Objective):
    """A number a row: Huber's loss, in standard deviations of the targets so far.

    Statistics are how many there were, their sum, and that of their squares. There is no prior correction: a
    tier's own mean is as likely a fact about its samples as an accident.
    """

    def no_counts(self, labels: int) -> Counts:
        return np.zeros(3)

    def count(self, targets: npt.NDArray[Any], labels: int) -> Counts:
        wide = targets.astype(np.float64)
        return np.array([len(wide), wide.sum(), wide @ wide])

    def prior(self, counts: Counts) -> npt.NDArray[np.float64]:
        return np.zeros(1)

    def scale(self, counts: Counts) -> Scale:
        number, total, squares = counts
        if not number:
            return Scale()
        mean = total / number
        deviation = float(np.sqrt(max(0.0, squares / number - mean**2)))
        return Scale(mean=float(mean), deviation=deviation if deviation > _LEAST * (1 + abs(mean)) else 1.0)

    def losses(self, answers: Tensor, targets: Tensor, smoothing: float, adjustment: Tensor) -> Tensor:
        return functional.huber_loss(answers[:, 0], targets, reduction="none")

    def distilled(self, answers: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return functional.huber_loss(answers, teacher.detach(), reduction="none")[:, 0]


def _mean_of_real(by_vector: Tensor, targets: Tensor) -> Tensor:
    """[K, N] -> [K], over the vectors that have a target."""
    real = (targets != NO_TARGET).to(by_vector.dtype)
    return (by_vector * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)


def _smoothed(answers: Tensor, targets: Tensor, smoothing: float, adjustment: Tensor) -> Tensor:
    """[…, C] and […] -> […]: cross-entropy with targets smoothed towards ``adjustment``."""
    log = answers.log_softmax(dim=-1)
    hit = log.gather(-1, targets[..., None])[..., 0]
    return -(1 - smoothing) * hit - smoothing * (adjustment.softmax(dim=-1) * log).sum(dim=-1)


def _binary(answers: Tensor, wanted: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(answers, wanted, reduction="none").mean(dim=1)


OBJECTIVES: Final[dict[Task, Objective]] = {
    Task.TEXT_CLASSIFICATION: Classification(),
    Task.IMAGE_CLASSIFICATION: Classification(),
    Task.CAUSAL_LM: NextToken(),
    Task.MULTI_LABEL: MultiLabel(),
    Task.REGRESSION: Regression(),
    Task.TOKEN_CLASSIFICATION: TokenClassification(),
}
if set(OBJECTIVES) != set(Task):  # pragma: no cover
    raise AssertionError("every Task needs an entry in OBJECTIVES")
