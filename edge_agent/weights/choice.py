"""Which versions a device listens for: its settings, its method's need, and what its budget leaves. Pure."""

from __future__ import annotations

from typing import Final

from edge_agent.config import WeightsChoice

_MIB: Final = 2**20


class VersionChoice:
    """Belongs to one thread.

    Args:
        choice: The setting.
        budget_mib: Beyond it, final versions only; 0 for no budget.
        spent_bytes: Of weights that have come already.
    """

    def __init__(self, choice: WeightsChoice, budget_mib: float = 0.0, spent_bytes: int = 0) -> None:
        self.needs_every = False
        """Whether the method cannot do without passing versions."""
        self._choice = choice
        self._budget_bytes = budget_mib * _MIB
        self._spent_bytes = spent_bytes

    def received(self, size: int) -> None:
        """So many bytes of weights have come."""
        self._spent_bytes += size

    @property
    def overspent(self) -> bool:
        """Whether there is a budget, and it is used up."""
        return 0 < self._budget_bytes <= self._spent_bytes

    @property
    def every(self) -> bool:
        """Whether passing versions are wanted too."""
        return self.needs_every or (self._choice == "every" and not self.overspent)
