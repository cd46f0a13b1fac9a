"""The mean of all ranks' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from side_trainer.cells.group import Group


def average_gradients(parameters: Sequence[torch.nn.Parameter], rows: int, group: Group) -> None:
    """Put in each gradient's place, the sum over this rank's rows, the mean over all ranks' rows.

    A parameter that no rank has a gradient of is left without one.

    Args:
        parameters: In the same order on all ranks.
        rows: How many this rank has; 0 for none.
        group: All ranks.

    Raises:
        CellLost: some are gone.
    """
    grads = [parameter.grad for parameter in parameters]
    facts = torch.tensor([*(float(grad is not None) for grad in grads), float(rows)])
    parts = [
        torch.zeros(parameter.numel()) if grad is None else grad.flatten().cpu()
        for parameter, grad in zip(parameters, grads, strict=True)
    ]
    whole = torch.cat([*parts, facts])
    group.add(whole)
    summed, knowing = whole[: -len(facts)], whole[-len(facts) : -1].tolist()
    summed /= whole[-1]
    for parameter, part, ranks in zip(
        parameters, torch.split(summed, [len(one) for one in parts]), knowing, strict=True
    ):
        parameter.grad = part.view_as(parameter).to(parameter.device) if ranks else None
