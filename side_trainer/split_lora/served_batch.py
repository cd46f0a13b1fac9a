"""A journaled batch of a split job as it is learnt from, and the loss of its rows.

Legend: K rows of a batch, N vectors in all of them, M of them with a target of their own, d hidden size,
C numbers in an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from side_trainer.journal.decoded import Decoded
from side_trainer.side_tuning.objectives import Objective
from side_trainer.side_tuning.token_loss import head_losses
from sidestream.contract.messages import ActivationBatch, SplitPart, context_of
from sidestream.contract.tasks import PER_VECTOR, Scale, Targets
from sidestream.contract.tensors import Floats, decode
from sidestream.contract.wire import unpack

if TYPE_CHECKING:
    from sidestream.split_model.split_model import SplitModel


@dataclass(frozen=True, kw_only=True)
class ServedBatch:
    """See the module."""

    states: Floats
    """[N, d]: at the cut, as the device sent them."""
    lengths: npt.NDArray[np.int64]
    """[K]."""
    targets: Targets
    """[K, …]; where vectors have targets, [M]."""
    told: npt.NDArray[np.bool_]
    """[N]: which vectors have one, where they may."""
    keys: bytes
    """u64[K] of the rows that are here."""
    whole: bool
    """Whether all rows are here that the device made the batch of."""

    @classmethod
    def read(cls, payload: bytes) -> ServedBatch:
        """Decode a payload that the inbox has accepted."""
        batch = unpack(ActivationBatch, payload)
        return cls.of(Decoded(batch, decode(batch.activations)))

    @classmethod
    def of(cls, decoded: Decoded) -> ServedBatch:
        """A batch that is decoded already."""
        batch, values = decoded
        lengths = batch.row_lengths.astype(np.int64)
        told = told_vectors(batch)
        targets = batch.read_targets()
        return cls(
            states=values[0],
            lengths=lengths,
            targets=targets[told] if batch.target_form in PER_VECTOR else targets,
            told=told,
            keys=batch.keys,
            whole=len(lengths) == part_of(batch).rows,
        )


def part_of(batch: ActivationBatch) -> SplitPart:
    """What a batch of a split job says beside its activations; the inbox has seen that it is there."""
    assert batch.part is not None
    return batch.part


def told_vectors(batch: ActivationBatch) -> npt.NDArray[np.bool_]:
    """[N]: vectors that have a target of their own; those of a row's context have none."""
    lengths = batch.row_lengths.astype(np.int64)
    context = context_of(part_of(batch), len(lengths))
    starts = np.cumsum(lengths) - lengths
    places = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    return places >= np.repeat(context, lengths)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """How batches are judged, as long as settings and counts are what they are."""

    objective: Objective
    """The task's."""
    smoothing: float
    """Of targets."""
    scale: Scale
    """What answers are measured in."""

    def of(
        self, model: SplitModel, answers: Tensor, batch: ServedBatch, adjustment: npt.NDArray[np.float64]
    ) -> Tensor:
        """The mean loss of a batch's rows; in a language model, of its vectors that have a target.

        Args:
            model: Has the head of a language model.
            answers: [K, C], or [N, d], of the batch.
            batch: What they are for.
            adjustment: [C]: added to the answers (logit adjustment by the label prior).
        """
        if model.head is not None:
            if not batch.told.any():  # nothing is learnt from contexts alone
                return 0.0 * answers.sum()
            told = torch.from_numpy(batch.told)
            targets = torch.from_numpy(batch.targets.astype(np.int64))
            return head_losses(model.head, answers[told], targets, self.smoothing).mean()
        shift = torch.from_numpy(adjustment.astype(np.float32)).expand_as(answers)
        return self.objective.losses(answers + shift, self._targets(batch), self.smoothing, shift).mean()

    def _targets(self, batch: ServedBatch) -> Tensor:
        targets = batch.targets
        if targets.dtype.kind == "f":
            scaled = (targets - self.scale.mean) / self.scale.deviation
            return torch.from_numpy(scaled.astype(np.float32))
        wide = targets.astype(np.float32 if targets.dtype == bool else np.int64)
        return torch.from_numpy(wide)


def joined(batches: Sequence[ServedBatch]) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """States [N, d] and lengths [K] of several batches, one after another; the states want a gradient."""
    states = np.concatenate([one.states for one in batches])
    return (
        torch.from_numpy(np.ascontiguousarray(states, np.float32)).requires_grad_(),
        np.concatenate([one.lengths for one in batches]),
    )
