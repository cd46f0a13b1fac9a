"""What was sampled, and who answers from it, in the form that a test compares."""

from __future__ import annotations

import numpy as np
import torch

from sidestream.backbone.sampled import Sampled
from sidestream.contract.tasks import TASKS, Task
from sidestream.side_network.bundle import About, Bundle
from sidestream.side_network.form import align_of
from sidestream.side_network.inference import InferenceNetwork
from sidestream.side_network.network import SideNetwork


def row_vectors(sampled: Sampled) -> list[torch.Tensor]:
    """[B, N, d] of each row."""
    rows = np.split(sampled.vectors, np.cumsum(sampled.lengths)[:-1], axis=1)
    return [torch.from_numpy(row) for row in rows]


def answering(
    network: SideNetwork, task: Task = Task.TEXT_CLASSIFICATION, labels: int = 0
) -> InferenceNetwork:
    """The network as devices answer with it."""
    tensors = network.arrays()
    maps = {name: one for name, one in tensors.items() if name.startswith("aligns.") and one.ndim == 3}
    about = About(
        job="j",
        run="0" * 32,
        version=1,
        labels=tuple(map(str, range(labels))) if TASKS[task].named else (),
        side_network=network.spec,
        aligns={str(align_of(name)): one.shape[1] for name, one in maps.items()},
        tiers={},
        task=task,
    )
    return InferenceNetwork(Bundle(about=about, tensors=tensors))
