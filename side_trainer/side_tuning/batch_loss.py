"""The loss of a mini-batch: the task's, with answers adjusted by label priors.

Each row's logits are adjusted by the label prior of the rows that teach them, against the fleet's (Menon et
al., arXiv 2007.07314): that keeps messages with skewed labels from pulling the shared network about. Rows
with more taps than another tier are also asked for that tier's answer.

Legend: K rows, N vectors a row (padded), C numbers in an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from side_trainer.journal.records import SettingsRecord, TierRecord
from side_trainer.side_tuning.objectives import OBJECTIVES, Counts
from side_trainer.side_tuning.token_loss import token_loss
from side_trainer.side_tuning.training_rows import MiniBatch
from side_trainer.side_tuning.views import Tapped, Views
from sidestream.contract.tasks import TASKS, Scale
from sidestream.side_network.network import SideNetwork
from sidestream.side_network.output_head import OutputHead


class BatchLoss:
    """Losses, as long as settings, tiers and counts are what they are.

    Args:
        settings: In force.
        tiers: By name.
        counts: Statistics of the targets of each tier's rows so far.
        head_of: The output head of a backbone family, by the name of its alignment map.
    """

    def __init__(
        self,
        settings: SettingsRecord,
        tiers: Mapping[str, TierRecord],
        counts: Mapping[str, Counts],
        head_of: Callable[[str], OutputHead],
    ) -> None:
        self._task = settings.task
        self._settings = learner = settings.learner
        self._objective = OBJECTIVES[settings.task]
        self._tiers = tiers
        self._counts = counts
        self._head_of = head_of
        tapped = {name: Tapped(tier.align, tier.taps) for name, tier in tiers.items()}
        self._views = Views(tapped, counts, self._objective, learner.exit_weight)
        self._all_counts: Counts = np.sum(list(counts.values()), axis=0)

    def of(self, network: SideNetwork, batch: MiniBatch) -> tuple[Tensor, npt.NDArray[Any]]:
        """The mini-batch's loss, and each row's own [K] to show."""
        settings = self._settings
        if TASKS[self._task].generates:
            return token_loss(network, batch, self._head_of, settings.label_smoothing)
        exits = {len(tier.taps) for tier in self._tiers.values()}
        families = [(family.align, family.activations) for family in batch.families]
        answers, alone = network.answers(families, batch.mask, exits)
        own = _own_answers(answers, [(len(taps), taps.shape[1]) for _, taps in families])
        targets = self._scaled(batch.targets)
        losses = self._losses(own, self._adjustments(batch), targets)
        anchored, share = self._anchored(batch, own, answers, losses, targets)
        total = anchored.sum()
        for taps in sorted(exits):
            deeper = sum(
                family.activations.shape[1] for family in batch.families if len(family.activations) > taps
            )
            if deeper:
                adjustment = self._adjustments(batch, taps)[:deeper]
                early = self._early(answers[taps][:deeper], own[:deeper], adjustment, targets[:deeper])
                total = total + settings.exit_weight * early
        for taps, said in alone.items():
            adjustment = self._adjustments(batch, taps)[: len(said)]
            total = total + (share[: len(said)] * self._losses(said, adjustment, targets[: len(said)])).sum()
        return total / len(batch.targets), losses.detach().numpy()

    def _early(self, answers: Tensor, own: Tensor, adjustment: Tensor, targets: Tensor) -> Tensor:
        """What deep rows teach a shallower tier's answers: from the label and from their own, deeper ones."""
        share = self._settings.distillation
        hard = self._losses(answers, adjustment, targets).sum()
        soft = self._objective.distilled(answers + adjustment, own + adjustment, targets).sum()
        return (1 - share) * hard + share * soft

    def _losses(self, answers: Tensor, adjustment: Tensor, targets: Tensor) -> Tensor:
        """[K]: of answers that are adjusted as the rows' labels do."""
        return self._objective.losses(
            answers + adjustment, targets, self._settings.label_smoothing, adjustment
        )

    def _anchored(
        self, batch: MiniBatch, own: Tensor, answers: dict[int, Tensor], losses: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[K]: ``losses``; where a shallower answer is to be trusted more, partly the distance from that.

        And [K]: the share of them that is left.
        """
        exits = answers.keys()
        anchors = {tier: self._views.anchor(tier, exits, self._all_counts) for tier in set(batch.tiers)}
        base = own.detach().clone()
        for tier, anchor in anchors.items():
            rows = [row for row, of in enumerate(batch.tiers) if of == tier]
            base[rows] = answers[anchor.taps][rows].detach()
        share = torch.tensor([anchors[tier].share for tier in batch.tiers])
        return share * losses + (1 - share) * self._objective.distilled(own, base, targets), share

    def _adjustments(self, batch: MiniBatch, taps: int = 0) -> Tensor:
        """[K, C], or [K, 1, C]: each row's logit adjustment at ``taps`` taps, or 0 for its own last."""
        fleet = self._objective.prior(self._all_counts)
        own = {
            tier: self.adjustment(tier, taps or len(self._tiers[tier].taps), fleet)
            for tier in set(batch.tiers)
        }
        stacked = np.stack([own[tier] for tier in batch.tiers]).astype(np.float32)
        adjustment = self._settings.prior_correction * torch.from_numpy(stacked)
        return adjustment[:, None] if batch.per_vector else adjustment

    def adjustment(self, tier: str, taps: int, fleet: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """[C]: what a tier's answer at ``taps`` taps is adjusted by; ``fleet`` is the prior of all rows."""
        return self._views.adjustment(tier, taps, fleet)

    def _scaled(self, targets: Tensor) -> Tensor:
        """Targets in the measure of answers."""
        scale = self._objective.scale(self._all_counts)
        return targets if scale == Scale() else (targets - scale.mean) / scale.deviation


def _own_answers(answers: dict[int, Tensor], families: list[tuple[int, int]]) -> Tensor:
    """Each row's answers at its own last tap, [K, …]; ``families`` are (taps, rows), by falling taps."""
    parts, start = [], 0
    for taps, rows in families:
        parts.append(answers[taps][start : start + rows])
        start += rows
    return torch.cat(parts)
