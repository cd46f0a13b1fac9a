"""How this device makes its batches: by its tier's plan, or as the trainer assigned to it alone."""

from __future__ import annotations

from typing import NamedTuple

from sidestream.contract.errors import MismatchError
from sidestream.contract.messages import Assignment
from sidestream.contract.plan import Plan
from sidestream.contract.sampling import Rung


class Way(NamedTuple):
    """What the next batch goes by."""

    batch_size: int
    max_tokens: int
    rung: Rung | None
    """None where the tier's own sampling and codec, or the device's budgets, say how it is sent."""


class Assigned:
    """What is in force; replaced whole, so that any thread may read it.

    Args:
        plan: The job.
        tier: This device's tier.
    """

    def __init__(self, plan: Plan, tier: str) -> None:
        known = plan.tiers[tier]
        self.way = self._own = Way(known.batch_size, known.max_tokens, None)
        """What the next batch goes by."""
        self.version = 0
        """Of the assignment in force; 0 while the tier's plan is."""
        self.bounds = known.assignable
        """What may be assigned; None for nothing."""
        self._run = plan.run
        self._fence = 0

    def take(self, assignment: Assignment) -> bool:
        """Go by an assignment from the next batch on; return whether that is news.

        Raises:
            MismatchError: it is another journal's, older than one that was taken, or outside the bounds.
        """
        if self.bounds is None:
            raise MismatchError("the plan lets nothing be assigned")
        if assignment.run != self._run:
            raise MismatchError("it is of another journal of the trainer's")
        if (assignment.fence, assignment.version) < (self._fence, self.version):
            raise MismatchError(f"it is older (version {assignment.version}) than {self.version}")
        if why := self.bounds.why_not(assignment):
            raise MismatchError(why)
        news = assignment.version != self.version
        rung = Rung(sampling=assignment.sampling, codec=assignment.codec)
        own = self._own if assignment.version == 0 else None
        self.way = own or Way(assignment.batch_size, assignment.max_tokens, rung)
        self._fence, self.version = assignment.fence, assignment.version
        return news
