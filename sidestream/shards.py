"""A data set dealt out to devices with skewed labels, as federated-learning papers do. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """A text and its label."""

    text: str
    label: str


def deal(examples: Sequence[Example], devices: int, *, alpha: float, seed: int) -> list[list[Example]]:
    """Deal every example to one device, each label in Dirichlet(alpha) proportions (Hsu et al. 2019).

    A small ``alpha`` gives devices few labels each, a large one gives all the same mixture. Every device gets
    one example at least; the order within a device is shuffled.

    Raises:
        ValueError: if there are fewer examples than devices.
    """
    if len(examples) < devices:
        raise ValueError(f"{len(examples)} examples do not go round {devices} devices")
    rng = np.random.default_rng(seed)
    shares: list[list[Example]] = [[] for _ in range(devices)]
    for label in sorted({example.label for example in examples}):
        of_label = [example for example in examples if example.label == label]
        order = rng.permutation(len(of_label))
        bounds = np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1] * len(of_label)
        for share, part in zip(shares, np.split(order, np.rint(bounds).astype(int)), strict=True):
            share.extend(of_label[index] for index in part)
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [[share[index] for index in rng.permutation(len(share))] for share in shares]
