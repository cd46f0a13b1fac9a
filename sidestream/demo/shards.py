"""A data set dealt out to devices with skewed labels, as federated-learning papers do. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edge_agent.batches.targets import names_in
from edge_agent.samples.sample import Row
from sidestream.contract.tasks import TASKS, TargetForm, Task


class Example(NamedTuple):
    """A text, perhaps a pair, and its label as it stands in the data."""

    text: str
    label: str
    pair: str | None = None

    @property
    def row(self) -> Row:
        """As an agent reads it."""
        return Row(self.text if self.pair is None else (self.text, self.pair), self.label)


def groups_of(task: Task, examples: Sequence[Example]) -> list[str]:
    """What examples are skewed by: their label, their set's first label, or their number's tenth."""
    if task is Task.REGRESSION:
        numbers = np.array([float(example.label) for example in examples])
        ranks = numbers.argsort(kind="stable").argsort(kind="stable")
        return [str(rank * 10 // len(examples)) for rank in ranks.tolist()]
    if TASKS[task].form is TargetForm.LABELS:
        return [example.label for example in examples]
    return [min(names_in(task, example.label), default="") for example in examples]


def deal(
    examples: Sequence[Example], devices: int, *, alpha: float, seed: int, groups: Sequence[str] = ()
) -> list[list[Example]]:
    """Deal every example to one device, each label in Dirichlet(alpha) proportions (Hsu et al. 2019).

    A small ``alpha`` gives devices few labels each, a large one gives all the same mixture. Every device gets
    one example at least; the order within a device is shuffled. ``groups``, one an example, take the place of
    labels where these are no names.

    Raises:
        ValueError: if there are fewer examples than devices.
    """
    if len(examples) < devices:
        raise ValueError(f"{len(examples)} examples do not go round {devices} devices")
    rng = np.random.default_rng(seed)
    shares: list[list[Example]] = [[] for _ in range(devices)]
    groups = groups or [example.label for example in examples]
    for group in sorted(set(groups)):
        of_label = [example for example, of in zip(examples, groups, strict=True) if of == group]
        order = rng.permutation(len(of_label))
        bounds = np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1] * len(of_label)
        for share, part in zip(shares, np.split(order, np.rint(bounds).astype(int)), strict=True):
            share.extend(of_label[index] for index in part)
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [[share[index] for index in rng.permutation(len(share))] for share in shares]
