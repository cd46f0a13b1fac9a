"""What a method says of a tier before and when it is settled. Its registry is :mod:`.method_registry`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

from side_trainer.journal.journal import Journal
from side_trainer.journal.records import TierRecord
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.messages import Status
from sidestream.contract.plan import TierPlan


class UnsuitableTier(Exception):  # noqa: N818  (the operator's settings are at fault)
    """Why a tier cannot join."""


class TierSettler(ABC):
    """Settles tiers for one job. Belongs to the job.

    Args:
        config: The operator's settings.
        journal: The job's.
    """

    def __init__(self, config: TrainerConfig, journal: Journal) -> None:
        self.config = config
        """Grows by tiers."""
        self.journal = journal

    def look(self, settled: Mapping[str, TierRecord], check: Callable[[], object], *, patient: bool) -> bool:
        """Look on this machine for what tiers need that are not settled yet; return whether more is known.

        Args:
            settled: Those that are.
            check: Raises if no plan can be made with what is known now.
            patient: Say what is missing and go on: it is looked for again.

        Raises:
            BackboneError: something is missing, and we are not patient.
            WireError: no plan can be made with it, likewise.
        """
        return False

    def unseen(self, settled: Mapping[str, TierRecord]) -> Iterable[TierRecord]:
        """Tiers that can be settled before any device of theirs has come."""
        return ()

    def shown(self, name: str, plan: TierPlan) -> TierPlan:
        """A tier's plan with what is known of it before it is settled."""
        return plan

    @abstractmethod
    def settle(self, name: str, status: Status, settled: Mapping[str, TierRecord]) -> TierRecord | None:
        """What the first device of a tier fixes; None if it does not show enough.

        Raises:
            UnsuitableTier: the tier cannot join.
        """
