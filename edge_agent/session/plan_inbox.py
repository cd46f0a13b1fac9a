"""The plan as it comes: whether it may be believed, whether work can go on under it, what it lacks for us.

Belongs to one thread, but for :attr:`PlanInbox.plan` and :meth:`PlanInbox.check_backbone`.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable

from edge_agent.store.outbox import Outbox
from edge_agent.weights.trust import Trust
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import BackboneError, ConfigError, DecodeError, UntrustedError
from sidestream.contract.messages import HIGHEST_FENCE
from sidestream.contract.plan import METHODS, Plan, TierPlan

_WAITING_S = 10.0  # how often it says what it waits for
_STANDS_S = 20.0  # a plan that is older than another one, and is what stands after so long, is in force again
_TIER_WAIT_S = 30.0  # a plan without our tier may be about to change
log = logging.getLogger(__name__)


def _order(plan: Plan) -> tuple[int, int]:
    """Of two plans of one journal the higher one is in force."""
    return plan.fence, plan.revision


class PlanVerdict(enum.Enum):
    """What a plan that came means."""

    UNTRUSTED = "not adopted"
    IGNORED = "ignored"
    IN_FORCE = "in force"
    START_OVER = "start over"


class PlanInbox:
    """Hears of plans.

    Args:
        job: The job's name.
        tier: The device's tier.
        outbox: Told which journal it sends to.
        trust: Says whose plans are believed.
        clock: Seconds.
    """

    def __init__(
        self,
        job: str,
        tier: str,
        outbox: Outbox,
        trust: Trust,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan: Plan | None = None
        """The plan in force."""
        self._job = job
        self._tier = tier
        self._outbox = outbox
        self._trust = trust
        self._clock = clock
        self._fence = 0  # the highest of a trainer's that was seen
        self._older: tuple[bytes, float] | None = None  # what came last, if it was ignored, and since when
        self._refused = ""
        self._waiting_s = clock()
        self._missing_s: float | None = None

    @property
    def tier(self) -> TierPlan | None:
        """What the plan says of our tier."""
        return self.plan.tiers.get(self._tier) if self.plan is not None else None

    @property
    def waits(self) -> bool:
        """Whether no plan of the job has come, believed or not."""
        return self.plan is None and not self._refused and self._older is None

    @property
    def ready(self) -> bool:
        """Whether the plan in force lets our tier compute."""
        return self.plan is not None and self.plan.ready_for(self._tier)

    def is_deposed(self, fence: int) -> bool:
        """Whether it is the fence of a trainer that another one has taken over from."""
        return fence < self._fence

    def on_plan(self, payload: bytes, *, working: bool) -> PlanVerdict:
        """A plan came.

        Args:
            payload: As it was received.
            working: Whether a plan that was ready for our tier was acted on; it then has to stay as it is.

        Raises:
            DecodeError: it is none.
        """
        try:
            plan = self._trust.open_plan(payload)
        except UntrustedError as exc:
            self._refuse(str(exc))
            return PlanVerdict.UNTRUSTED
        except DecodeError as exc:
            if "`$.method" not in str(exc):
                self._refused = str(exc)
                raise
            self._refuse(
                f"the job learns by a method that this agent does not know (it knows {', '.join(METHODS)}); "
                "update the agent to the trainer's version"
            )
            return PlanVerdict.IGNORED
        if plan.job != self._job or plan.fence > HIGHEST_FENCE:
            log.error("ignored a plan of job %r with fence %d", plan.job, plan.fence)
            return PlanVerdict.IGNORED
        before = self.plan
        if self.is_deposed(plan.fence):
            return self._ignore(payload, "of a trainer that another one has taken over from")
        # A trainer that was started anew, from a backup perhaps, counts its revisions anew.
        if before is not None and before.run == plan.run and _order(plan) < _order(before):
            return self._ignore(payload, f"of revision {plan.revision}, after {before.revision}")
        return self._take(plan, working)

    def stands(self, now: float, *, working: bool) -> PlanVerdict:
        """Believe an ignored plan after all, if nobody contradicted it for a while.

        What made it look old was no trainer's then, or is gone: a trainer that rules puts its own plan back
        at once. Where plans are signed none is ignored here; they are refused before.
        """
        if self._older is None or now - self._older[1] < _STANDS_S:
            return PlanVerdict.IGNORED
        plan = self._trust.open_plan(self._older[0])
        log.warning(
            "nobody replaced the plan of fence %d, revision %d: following it again",
            *(plan.fence, plan.revision),
        )
        return self._take(plan, working)

    def _ignore(self, payload: bytes, why: str) -> PlanVerdict:
        if self._older is None or self._older[0] != payload:
            log.error("ignored a plan %s, unless nobody replaces it", why)
            self._older = payload, self._clock()
        return PlanVerdict.IGNORED

    def _take(self, plan: Plan, working: bool) -> PlanVerdict:
        before = self.plan
        self._fence, self._refused, self._older = plan.fence, "", None
        self._trust.adopted_plan(plan)
        if before is not None and self._essence(before, working) != self._essence(plan, working):
            log.info("the job's plan has changed: starting over with it")
            return PlanVerdict.START_OVER
        if before is None and self._outbox.begin_run(plan.run):
            log.warning("the trainer has started a new journal: all samples are computed for it anew")
            return PlanVerdict.START_OVER
        self.plan = plan
        return PlanVerdict.IN_FORCE

    def check_tier(self, now: float, *, working: bool, labels_known: bool, loaded: bool) -> None:
        """Say what is being waited for, and give up on a plan that does not know our tier.

        Raises:
            ConfigError: our tier is not in the plan, and has not been for a while.
        """
        if not working and now - self._waiting_s > _WAITING_S:
            self._waiting_s = now
            log.info("waiting %s", self._waits_for(labels_known, loaded))
        if self.plan is None or self.tier is not None:
            self._missing_s = None
            return
        message = f"{self._tier!r} is no tier of the job; its plan has: {', '.join(sorted(self.plan.tiers))}"
        if self._missing_s is None:
            self._missing_s = now
            log.error("tier: %s (waiting %.0f s for another plan)", message, _TIER_WAIT_S)
        elif now - self._missing_s > _TIER_WAIT_S:
            raise ConfigError("tier", message)

    def trouble(self, *, labels_known: bool, loaded: bool) -> str:
        """In words, what is wrong with the plan or lacks in it; empty once there is one to work by."""
        if self._refused:
            return f"a plan is not adopted: {self._refused}"
        if self.plan is not None and self.tier is None:
            return f"tier {self._tier!r} is none of the job's: {', '.join(sorted(self.plan.tiers))}"
        return "" if self.ready else f"waits {self._waits_for(labels_known, loaded)}"

    def check_backbone(self, backbone: Backbone | None) -> None:
        """Refuse to work with a backbone that is not the job's.

        Raises:
            BackboneError: it has other weights, or another shape.
        """
        wanted = self.tier
        if backbone is None or wanted is None:
            return
        if wanted.fingerprint:
            backbone.check(wanted.fingerprint)
        if wanted.settled and (wanted.depth, wanted.width) != (backbone.depth, backbone.width):
            raise BackboneError(
                f"{backbone.name} has {backbone.depth} layers of width {backbone.width}, the plan's tier "
                f"{self._tier!r} has {wanted.depth} of {wanted.width}"
            )

    def _waits_for(self, labels_known: bool, loaded: bool) -> str:
        if self.plan is None:
            trouble = f"one came, but {self._refused}" if self._refused else "is its trainer running?"
            return f"for the plan of job {self._job!r}: {trouble}"
        heads = self.plan.method.needs_head(self.plan.task)
        if heads and self.tier is not None and not self.tier.head:
            return (
                "until the trainer has the output head of this tier's backbone; its log says what is missing"
            )
        loads = self.tier is not None and not loaded and not self.plan.method.awaits_cut(self.tier)
        if loads and not self.plan.lacks_labels:  # what is loaded settles the tier
            return "until its backbone is loaded"
        what = "the labels" if self.plan.lacks_labels else "the tier"
        hint = (
            ""
            if not self.plan.lacks_labels or labels_known
            else (
                "; none are in this device's data yet: other devices may bring some, or the trainer's "
                "settings give them"
            )
        )
        return f"until the trainer has settled {what} of job {self._job!r}{hint}"

    def _refuse(self, why: str) -> None:
        """Say it once; a stranger who can publish may send many."""
        if why != self._refused:
            log.error("a plan is not adopted: %s", why)
        self._refused = why

    def _essence(self, plan: Plan, working: bool) -> object:
        """What no session outlives a change of."""
        tier = plan.tiers.get(self._tier)
        if working:
            return (plan.run, tier, plan.task, plan.labels, plan.side_network, plan.method)
        cut = tier is not None and plan.method.awaits_cut(tier)
        return (
            *(plan.run, plan.task, type(plan.method)),
            tier and (tier.backbone, cut or tier.layers, tier.precision, tier.head),
        )
