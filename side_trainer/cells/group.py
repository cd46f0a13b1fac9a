"""The trainers of a job's cells, as one of them sees the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class CellLost(Exception):  # noqa: N818  (it says what happened)
    """Another cell's trainer is gone, or does not answer: what was under way has not happened."""


class Group(Protocol):
    """Ranks that do the same things in the same order: each call returns once all have made it.

    Every call raises:
        CellLost: not all are there. The group has to be formed anew.
    """

    @property
    def rank(self) -> int:
        """This one's, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def gather(self, what: str, data: bytes) -> list[bytes]:
        """Tell all others, and hear from them; by rank.

        Args:
            what: What it is, which has to be the same on all ranks.
            data: This rank's.
        """

    def add(self, values: torch.Tensor) -> None:
        """Replace a vector, on the processor, by the sum of all ranks'."""
