"""The loss of a mini-batch: the task's, with answers adjusted by label priors.

Each row's logits are adjusted by the label prior of the rows that teach them, against the fleet's (Menon et
al., arXiv 2007.07314): that keeps messages with skewed labels from pulling the shared network about. Rows
with more taps than another tier are also asked for that tier's answer, and where a shallower answer is to be
trusted more than a row's own, that one is partly held to it (:mod:`side_trainer.side_tuning.views`).

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
from side_trainer.method import Facts
from side_trainer.rows.training_rows import MiniBatch
from side_trainer.side_tuning.objectives import OBJECTIVES, Counts
from side_trainer.side_tuning.token_loss import token_loss
from side_trainer.side_tuning.views import Tapped, Views
from sidestream.accelerator.torch_device import HERE, Placement
from sidestream.contract.tasks import TASKS, Scale
from sidestream.contract.tensors import Floats
from sidestream.side_network.form import align_of, starts_among
from sidestream.side_network.network import SideNetwork
from sidestream.side_network.output_head import OutputHead


class BatchLoss:
    """Losses, as long as settings, tiers and counts are what they are.

    Args:
        settings: In force.
        tiers: By name.
        counts: Statistics of the targets of each tier's rows so far.
        head_of: The output head of a backbone family, by the name of its alignment map.
        place: Where network and mini-batches are.
    """

    def __init__(
        self,
        settings: SettingsRecord,
        tiers: Mapping[str, TierRecord],
        counts: Mapping[str, Counts],
        head_of: Callable[[str], OutputHead],
        place: Placement = HERE,
    ) -> None:
        self.place = place
        """Where network and mini-batches are."""
        self._generates = TASKS[settings.task].generates
        self._settings = settings.learner
        self._objective = OBJECTIVES[settings.task]
        self._head_of = head_of
        self._numbers = {name: number for number, name in enumerate(tiers)}
        self._own_taps = {name: len(tier.taps) for name, tier in tiers.items()}
        self._exits = sorted(set(self._own_taps.values()))
        tapped = {name: Tapped(tier.align, tier.taps) for name, tier in tiers.items()}
        self._views = Views(tapped, counts, self._objective, self._settings.exit_weight)
        all_counts: Counts = np.sum(list(counts.values()), axis=0)
        self._fleet = self._objective.prior(all_counts)
        self._scale = self._objective.scale(all_counts)
        self._anchors = {name: self._views.anchor(name, self._exits, all_counts) for name in tiers}
        shares = [anchor.share for anchor in self._anchors.values()]
        self._shares = place.send(torch.tensor(shares))  # by tier's number
        self._tables: dict[int, Tensor] = {}

    def of(self, network: SideNetwork, batch: MiniBatch) -> tuple[Tensor, npt.NDArray[Any]]:
        """The mini-batch's loss, and each row's own [K] to show."""
        if self._generates:
            return token_loss(network, batch, self._head_of, self._settings.label_smoothing)
        families = [(family.align, family.activations) for family in batch.families]
        answers, alone = network.answers(families, batch.mask, self._exits)
        own = _own_answers(answers, [(len(taps), taps.shape[1]) for _, taps in families])
        owners = self.place.send(torch.tensor([self._numbers[tier] for tier in batch.tiers]))  # [K]
        targets = batch.targets
        if self._scale != Scale():  # in the measure of answers
            targets = (targets - self._scale.mean) / self._scale.deviation
        losses = self._losses(own, self._adjustments(batch, owners), targets)
        share = self._shares[owners]
        held = self._objective.distilled(own, self._anchored(batch, own, answers), targets)
        total = batch.weights @ (share * losses + (1 - share) * held)
        for taps in self._exits:
            deeper = sum(
                family.activations.shape[1] for family in batch.families if len(family.activations) > taps
            )
            if deeper:
                adjustment = self._adjustments(batch, owners[:deeper], taps)
                early = self._early(answers[taps][:deeper], own[:deeper], adjustment, targets[:deeper])
                total = total + self._settings.exit_weight * (batch.weights[:deeper] @ early)
        for taps, said in alone.items():
            adjustment = self._adjustments(batch, owners[: len(said)], taps)
            counted = batch.weights[: len(said)] * share[: len(said)]
            total = total + counted @ self._losses(said, adjustment, targets[: len(said)])
        return total / len(batch.targets), self.place.fetch(losses.detach()).numpy()

    def _early(self, answers: Tensor, own: Tensor, adjustment: Tensor, targets: Tensor) -> Tensor:
        """[K]: of deep rows at a shallower tier's answers: by the label and by their own, deeper ones."""
        share = self._settings.distillation
        hard = self._losses(answers, adjustment, targets)
        soft = self._objective.distilled(answers + adjustment, own + adjustment, targets)
        return (1 - share) * hard + share * soft

    def _losses(self, answers: Tensor, adjustment: Tensor, targets: Tensor) -> Tensor:
        """[K]: of answers that are adjusted as the rows' labels do."""
        return self._objective.losses(
            answers + adjustment, targets, self._settings.label_smoothing, adjustment
        )

    def _anchored(self, batch: MiniBatch, own: Tensor, answers: dict[int, Tensor]) -> Tensor:
        """As ``own``: what each row's own answer is held to, as far as it is not to be trusted itself."""
        base = own.detach().clone()
        for tier in set(batch.tiers):
            rows = [row for row, of in enumerate(batch.tiers) if of == tier]
            base[rows] = answers[self._anchors[tier].taps][rows].detach()
        return base

    def _adjustments(self, batch: MiniBatch, owners: Tensor, taps: int = 0) -> Tensor:
        """[K, C], or [K, 1, C]: each row's logit adjustment at ``taps`` taps, or 0 for its own last."""
        if taps not in self._tables:
            rows = [self.adjustment(tier, taps or own) for tier, own in self._own_taps.items()]
            table = self.place.send(torch.from_numpy(np.stack(rows).astype(np.float32)))
            self._tables[taps] = self._settings.prior_correction * table
        adjustment = self._tables[taps][owners]
        return adjustment[:, None] if batch.per_vector else adjustment

    def adjustment(self, tier: str, taps: int) -> npt.NDArray[np.float64]:
        """[C]: what a tier's answer at ``taps`` taps is adjusted by."""
        return self._views.adjustment(tier, taps, self._fleet)


def loss_by(weights: Mapping[str, Floats], facts: Facts, loss: BatchLoss, batch: MiniBatch) -> float:
    """A mini-batch's mean loss by some of a job's weights; by untrained ones if there are none."""
    network = _network_of(weights, facts, loss.place)
    with torch.no_grad():
        _, shown = loss.of(network, batch)
    return float(np.average(shown, weights=loss.place.fetch(batch.weights).numpy() + 1e-9))


def answers_by(
    weights: Mapping[str, Floats], facts: Facts, place: Placement, batch: MiniBatch
) -> npt.NDArray[np.float64]:
    """[K, C]: logarithms of the shares that rows' own answers give the labels, by some of a job's weights."""
    network = _network_of(weights, facts, place)
    families = [(family.align, family.activations) for family in batch.families]
    with torch.no_grad():
        answers = network(families, batch.mask)
    own = _own_answers(answers, [(len(taps), taps.shape[1]) for _, taps in families])
    found: npt.NDArray[np.float64] = place.fetch(own).double().log_softmax(dim=-1).numpy()
    return found


def _network_of(weights: Mapping[str, Floats], facts: Facts, place: Placement) -> SideNetwork:
    """The job's network, not learning, with some weights; untrained without."""
    settings, names = facts.settings, {align_of(name) for name in weights}
    network = SideNetwork(
        settings.side_network, labels=len(facts.labels), seed=settings.learner.seed, task=settings.task
    )
    for align, width in {tier.align: tier.width for tier in facts.tiers.values()}.items():
        if not weights or align in names:
            network.add_align(align, width)
    for align, counts in starts_among(weights).items():
        for taps in counts:
            network.add_start(align, taps)
    if weights:
        network.load_arrays(weights)
    return place.put(network).eval()


def _own_answers(answers: dict[int, Tensor], families: list[tuple[int, int]]) -> Tensor:
    """Each row's answers at its own last tap, [K, …]; ``families`` are (taps, rows), by falling taps."""
    parts, start = [], 0
    for taps, rows in families:
        parts.append(answers[taps][start : start + rows])
        start += rows
    return torch.cat(parts)
