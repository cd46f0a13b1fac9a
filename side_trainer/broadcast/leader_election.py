"""Whether this trainer is the job's one trainer: asks before it starts, answers those who ask, gives way.

Two trainers of one job would each tell devices to delete what only the other has. So every start of a trainer
has a **fence**, a number that is higher than any seen before, and the highest one rules:

- On each connection a trainer publishes a claim and waits until it hears it back: by then it has also heard
  the status that is retained. If that is another trainer's and says online, and it answers, a trainer that
  has just been started refuses to run; one that was told to take over raises its fence above the other's.
- A trainer that hears of a higher fence stops for good and says why. Devices ignore the plans and receipts
  of a lower fence than they have seen, so that nothing a deposed trainer still says does any harm.

Pure: no socket, no clock.
"""

from __future__ import annotations

from typing import Final

from sidestream.contract.errors import StateError
from sidestream.contract.messages import HIGHEST_FENCE, TrainerClaim, TrainerStatus

ECHO_S: Final = 5.0
"""A claim that is not heard back after so long (an access list may forbid it) is taken as heard."""
ANSWER_S: Final = 3.0
"""A trainer whose retained status says online has so long to answer a claim."""


_HINT: Final = (
    ". If you run no other, somebody who can write to the broker poses as one: start this one again with "
    "--take-over, and give the broker an access list and the trainer a signing key (sidestream fleet init "
    "makes both), after which such messages have no effect"
)


class LeaderElection:
    """The one trainer's, or another's. Belongs to one thread; :attr:`active` may be read from any.

    Args:
        instance: This process's random name.
        fence: Higher than that of any start before on this journal.
        take_over: Depose a trainer that is running.
    """

    def __init__(self, *, instance: str, fence: int, take_over: bool = False) -> None:
        self.instance = instance
        self.fence = fence
        self.active = False
        """Whether anything may be published and receipted."""
        self._take_over = take_over
        self._established = False
        self._highest = 0
        self._asked_s = float("-inf")
        self._heard = False
        self._rival: TrainerStatus | None = None
        self._answered = False

    def connected(self, now: float) -> TrainerClaim:
        """There is a new connection, and nothing is certain any more; return what to ask with."""
        self.active = False
        self._asked_s, self._heard, self._rival, self._answered = now, False, None, False
        return TrainerClaim(instance=self.instance, fence=self.fence, take_over=self._take_over)

    def disconnected(self) -> None:
        """Nothing can be published, and others may come meanwhile."""
        self.active = False

    def on_claim(self, claim: TrainerClaim) -> bool:
        """Hear a claim; return whether to answer it with our status."""
        if claim.instance == self.instance:
            self._heard = True
            return False
        return self.active

    def on_status(self, status: TrainerStatus, *, retained: bool) -> bool:
        """Hear a trainer's status; return whether to say ours again, because another's took its place.

        Raises:
            StateError: if it shows that another trainer has taken over.
        """
        if status.instance == self.instance:
            return False
        if status.fence > HIGHEST_FENCE:
            return self.active
        self._highest = max(self._highest, status.fence)
        if status.state == "online":
            if self._established and self._outranked(status):
                self.active = False
                raise StateError(
                    f"another trainer has taken over this job (run {status.run[:8]}, fence {status.fence} "
                    f"over {self.fence}): this one has stopped publishing, and what it journaled stays "
                    f"here{_HINT}"
                )
            if not self.active:
                self._rival, self._answered = status, self._answered or not retained
        return self.active

    def tick(self, now: float) -> bool:
        """Decide, once enough is known; return whether this is the moment from which we may publish.

        Raises:
            StateError: if another trainer runs and was not to be deposed.
        """
        waited_s = now - self._asked_s
        if self.active or not (self._heard or waited_s > ECHO_S) or self._asked_s == float("-inf"):
            return False
        rival = self._rival
        if rival is not None and not self._established:
            if not self._take_over and self._answered:
                raise StateError(
                    f"another trainer of this job is running (run {rival.run[:8]}, epoch {rival.epoch}); "
                    f"stop it first, or start this one with --take-over{_HINT}"
                )
            if not self._take_over and waited_s < ANSWER_S:
                return False
        # Also above one that has left: devices have seen its fence, and on a new journal the clock alone may
        # not lie above it.
        self.fence = max(self.fence, self._highest + 1)
        self.active = self._established = True
        return True

    def _outranked(self, status: TrainerStatus) -> bool:
        return (status.fence, status.instance) > (self.fence, self.instance)
