"""The loss of a language model: cross-entropy of the frozen head's answers to lifted states.

All logits of a mini-batch at once would take more memory than everything else together, so they are computed
some hundred states at a time, and with them at once the gradient for the states, which is all that is kept.

Legend: K rows, N vectors a row (padded), M vectors with a target, d the backbone's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from side_trainer.rows.training_rows import MiniBatch
from sidestream.side_network.network import SideNetwork
from sidestream.side_network.output_head import OutputHead


def token_loss(
    network: SideNetwork, batch: MiniBatch, head_of: Callable[[str], OutputHead], smoothing: float
) -> tuple[Tensor, npt.NDArray[Any]]:
    """The mean loss of the mini-batch's vectors, and each row's own [K].

    Args:
        network: What lifts the states.
        batch: Rows whose vectors each have a token for a target.
        head_of: The head of a family, by the name of its alignment map.
        smoothing: Of the targets.
    """
    families = [(family.align, family.activations) for family in batch.families]
    hidden, start = dict(network.trunk(families)), 0
    losses: list[Tensor] = []
    for family in batch.families:
        rows = slice(start, start := start + family.activations.shape[1])
        real = batch.mask[rows]
        states = network.lifted(
            family.align, hidden[len(family.activations)][rows][real], family.activations[-1][real]
        )
        losses.append(head_losses(head_of(family.align), states, batch.targets[rows][real], smoothing))
    each = torch.cat(losses)
    owners = torch.arange(len(batch.mask)).repeat_interleave(batch.mask.sum(dim=1))
    sums = np.bincount(owners.numpy(), weights=each.detach().numpy())
    return each.mean(), sums / batch.mask.sum(dim=1).numpy()


def head_losses(head: OutputHead, states: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """[M, d] and [M] -> [M] losses, differentiable in the states."""
    losses: Tensor = _HeadLosses.apply(states, targets, head, smoothing)  # type: ignore[no-untyped-call]
    return losses


class _HeadLosses(torch.autograd.Function):
    """Computes the gradient on the way forward, where the logits are."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: OutputHead, smoothing: float) -> Tensor:
        losses, gradients = torch.empty(len(states)), torch.empty_like(states)
        for part in head.chunks(states):
            with torch.enable_grad():
                chunk = states[part].detach().requires_grad_()
                each = functional.cross_entropy(
                    head(chunk), targets[part], reduction="none", label_smoothing=smoothing
                )
                (gradients[part],) = torch.autograd.grad(each.sum(), chunk)
            losses[part] = each.detach()
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * outer[0][:, None], None, None, None
