"""The work of one session: computing, sending, adopting, and taking up labels that came later.

Each has a thread of its own. The backbone is loaded as soon as the plan names one; the rest begins once the
plan is ready for the device's tier. Hears no messages: the session does, and tells.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from edge_agent.batches.late_labels import LateLabels
from edge_agent.batches.producer import Producer
from edge_agent.batches.rungs import Rungs
from edge_agent.batches.token_maker import TokenMaker, maker_of
from edge_agent.samples.source import SampleSource
from edge_agent.session.context import AgentContext
from edge_agent.session.plan_inbox import PlanInbox
from edge_agent.uplink.link_state import LinkState
from edge_agent.uplink.sender import Sender
from edge_agent.weights.adoption import Adopter, InUse
from edge_agent.weights.evaluation import EvaluationSet
from edge_agent.weights.token_evaluation import TokenEvaluation
from edge_agent.weights.weights_inbox import WeightsInbox
from sidestream.backbone.backbone import Backbone
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.tasks import TASKS

_TICK_S = 0.1
_ADOPT_FIRST_S = 2.0  # loading the backbone waits so long for retained weights: it would hold them up
_JOIN_S = 15.0


class Work:
    """The threads, and what goes to them. Belongs to the session's thread.

    Args:
        context: Whose work it is.
        source: Its samples.
        sender: Sends the batches.
        link: Told how fast the plan has it send; says how large they may be.
        plans: The plan in force.
        weights: Told when versions are wanted.
        on_backbone: Called on a thread of the work's own once the backbone is loaded.
        on_news: Likewise, when there is something to report: an adoption, a measurement, the end of the data.
    """

    def __init__(
        self,
        context: AgentContext,
        source: SampleSource,
        sender: Sender,
        link: LinkState,
        *,
        plans: PlanInbox,
        weights: WeightsInbox,
        on_backbone: Callable[[Backbone], None],
        on_news: Callable[[], None],
    ) -> None:
        self.failure: BaseException | None = None
        """What ended the first thread that failed."""
        self.produced = False
        """Whether the data has ended and all of it is computed."""
        self._context = context
        self._source = source
        self._sender = sender
        self._link = link
        self._plans = plans
        self._weights = weights
        self._on_backbone = on_backbone
        self._on_news = on_news
        self._adopter: Adopter | None = None
        self._threads: list[threading.Thread] = []
        self._ready = threading.Event()
        self._adopted = threading.Event()
        self._closing = threading.Event()

    @property
    def begun(self) -> bool:
        """Whether a plan that was ready is acted on."""
        return self._ready.is_set()

    @property
    def in_use(self) -> InUse | None:
        """The version in use, if there is one."""
        return self._adopter.in_use if self._adopter is not None else None

    def on_plan(self, plan: Plan, tier: TierPlan) -> None:
        """A plan that knows the device's tier is in force: do what it lets be done."""
        if not self._threads:
            self._start(self._compute, "producer")
        if self._plans.ready and not self.begun:
            self._begin(plan, tier)

    def stop(self) -> None:
        """End the threads, and wait for them a while."""
        self._closing.set()
        self._sender.stop()
        if self._adopter is not None:
            self._adopter.stop()
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # --- threads -----------------------------------------------------------------------------------------

    def _begin(self, plan: Plan, tier: TierPlan) -> None:
        """Labels are fixed and the tier is settled: everything but computing starts here."""
        context = self._context
        self._link.begin(plan.flow)
        self._adopter = Adopter(
            context.outbox.folder,
            plan,
            context.tier,
            backbone=self._reference(tier),
            on_change=self._on_adopted,
            on_refused=partial(context.outbox.count, "weights_refused", 1),
            metrics=context.metrics,
            trace=context.trace,
            trust=context.trust,
        )
        self._ready.set()
        self._start(self._adopter.run, "adopter")
        self._start(self._sender.run, "sender")
        if not TASKS[plan.task].generates:
            late_labels = LateLabels(
                context.outbox,
                plan,
                context.tier,
                max_message_bytes=self._link.max_message_bytes,
                stopped=self._stopped,
                on_batch=self._link.wake,
            )
            self._start(late_labels.run, "labels")
        self._weights.begin(plan.run, self._adopter)

    def _on_adopted(self) -> None:
        self._on_news()
        self._adopted.set()

    def _compute(self) -> None:
        """The producer's thread: load the backbone, wait until the job is ready, work off the source."""
        context, plan = self._context, self._plans.plan
        assert plan is not None
        tier = plan.tiers[context.tier]
        if self._plans.ready and self._weights.newest is not None:
            self._adopted.wait(_ADOPT_FIRST_S)
        backbone = context.load_backbone(self._reference(tier), tier.layers, tier.precision, plan.task)
        backbone.check_head(tier.head)
        backbone.check_texts(self._source.first_texts())
        self._on_backbone(backbone)
        while not self._ready.wait(_TICK_S):
            if self._stopped():
                return
        self._plans.check_backbone(backbone)
        plan, adopter = self._plans.plan, self._adopter
        assert plan is not None and adopter is not None
        adopter.evaluate_with(self._evaluation(plan, backbone))
        rungs = Rungs(
            backbone,
            plan,
            context.tier,
            self._link.max_message_bytes,
            bytes_per_sample=context.config.bytes_per_sample,
            link=context.budget,
            backlog=lambda: context.outbox.size()[1],
        )
        Producer(
            self._source,
            context.outbox,
            rungs,
            held_out_share=context.held_out_share,
            poll_s=context.config.data.poll_s,
            stopped=self._stopped,
            on_batch=self._link.wake,
            metrics=context.metrics,
            trace=context.trace,
        ).run()
        if not self._stopped():
            self.produced = True
            self._on_news()

    def _evaluation(self, plan: Plan, backbone: Backbone) -> EvaluationSet:
        context, data = self._context, self._context.config.data
        limit, given = data.evaluation_max_samples, context.evaluation_rows
        rows = (lambda: given) if given is not None else (lambda: context.outbox.held_out(limit))
        maker = maker_of(backbone, plan, context.tier, self._link.max_message_bytes)
        if isinstance(maker, TokenMaker):
            return TokenEvaluation(maker, rows, data.evaluation_max_tokens, stopped=self._stopped)
        codec = plan.tiers[context.tier].codec
        return EvaluationSet(maker, codec, plan.task, rows, stopped=self._stopped)

    def _reference(self, tier: TierPlan) -> str:
        return self._context.config.backbone or tier.backbone

    def _stopped(self) -> bool:
        return self._closing.is_set() or self._context.stop.is_set()

    def _start(self, work: Callable[[], None], name: str) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as exc:
                self.failure = self.failure or exc

        thread = threading.Thread(target=guarded, name=f"{name}-{self._context.name}", daemon=True)
        self._threads.append(thread)
        thread.start()
