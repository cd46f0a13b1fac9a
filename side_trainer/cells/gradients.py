"""The mean of all ranks' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from side_trainer.cells.group import Group


def average_gradients(parameters: Sequence[torch.nn.Parameter], rows: int, group: Group) -> None:
    """Put in each parameter's place of a gradient, the mean over this rank's rows, that over all ranks' rows.

    A parameter that no rank has a gradient of is left without one.

    Args:
        parameters: In the same order on all ranks.
        rows: How many this rank has; 0 for none.
        group: All ranks.

    Raises:
        CellLost: some are gone; gradients are as they were.
    """
    grads = [parameter.grad for parameter in parameters]
    parts = [
        torch.zeros(parameter.numel()) if grad is None else grad.detach().cpu().flatten() * rows
        for parameter, grad in zip(parameters, grads, strict=True)
    ]
    known = torch.tensor([float(grad is not None) for grad in grads])
    whole = torch.cat([*parts, known, torch.tensor([float(rows)])])
    group.add(whole)
    *sums, knowing, total = torch.split(whole, [*(len(part) for part in parts), len(parts), 1])
    for parameter, summed, ranks in zip(parameters, sums, knowing.tolist(), strict=True):
        parameter.grad = (summed / total).view_as(parameter).to(parameter.device) if ranks else None
