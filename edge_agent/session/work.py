"""The work of one session: computing, and between forward passes adopting and what else its method does.

All of it on one thread. The backbone is loaded as soon as the plan names one; the rest begins once the plan
is ready for the device's tier. Hears and sends no messages: the session does, and tells.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edge_agent.batches.side_tasks import SideTasks
from edge_agent.context import AgentContext
from edge_agent.method import DeviceMethod
from edge_agent.method_registry import METHODS
from edge_agent.samples.source import SampleSource, check_modality
from edge_agent.session.plan_inbox import PlanInbox
from edge_agent.uplink.link_state import LinkState
from edge_agent.weights.adoption import InUse
from edge_agent.weights.codebooks import CodebooksInbox
from edge_agent.weights.weights_inbox import WeightsInbox
from sidestream.backbone.backbone import Backbone
from sidestream.contract.messages import CodebooksChunk
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack

_LOOK_S = 0.5  # at most, where somebody wakes us
_ADOPT_FIRST_S = 2.0  # loading the backbone waits so long for retained weights: it would hold them up
_JOIN_S = 15.0


class Work:
    """The thread, and what goes to it. Belongs to the session's thread.

    Args:
        context: Whose work it is.
        source: Its samples.
        link: Told how fast the plan has it send; says how large batches may be.
        plans: The plan in force.
        weights: Told when versions are wanted.
        subscribe: Listens to a topic.
        on_backbone: Called on the work's thread once the backbone is loaded.
        on_news: Likewise, when there is something to report: an adoption, a measurement, the end of the data.
    """

    def __init__(
        self,
        context: AgentContext,
        source: SampleSource,
        link: LinkState,
        *,
        plans: PlanInbox,
        weights: WeightsInbox,
        subscribe: Callable[[str], None],
        on_backbone: Callable[[Backbone], None],
        on_news: Callable[[], None],
    ) -> None:
        self.failure: BaseException | None = None
        """What ended the work, if something did."""
        self.produced = False
        """Whether the data has ended and all of it is computed."""
        self._context = context
        self._source = source
        self._link = link
        self._plans = plans
        self._weights = weights
        self._subscribe = subscribe
        self._on_backbone = on_backbone
        self._on_news = on_news
        self._codebooks: CodebooksInbox | None = None
        self._method: DeviceMethod | None = None
        self._side_tasks = SideTasks()
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._closing = threading.Event()

    @property
    def begun(self) -> bool:
        """Whether a plan that was ready is acted on."""
        return self._ready.is_set()

    @property
    def lacks_codebooks(self) -> bool:
        """Whether it waits for codebooks."""
        return self._codebooks is not None and not self._codebooks.found.is_set()

    @property
    def in_use(self) -> InUse | None:
        """The version in use, if there is one."""
        return self._method.adopter.in_use if self._method is not None else None

    @property
    def assignment(self) -> int:
        """The version of what the trainer assigned to this device; 0 while it goes by its tier's plan."""
        return self._method.assignment if self._method is not None else 0

    def on_plan(self, plan: Plan) -> None:
        """A plan that knows the device's tier is in force: do what it lets be done."""
        if self._thread is None:
            name = f"work-{self._context.name}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
        if self._plans.ready and not self.begun:
            self._begin(plan)

    def on_message(self, topic: str, payload: bytes) -> None:
        """A message that is the method's.

        Raises:
            DecodeError: it is none.
        """
        prefix = Topics(self._context.config.job).codebooks_filter(self._context.tier)[:-1]
        if topic.startswith(prefix) and self._codebooks is not None:
            self._codebooks.on_chunk(unpack(CodebooksChunk, payload))
            self._side_tasks.wake()
        elif self._method is not None:
            self._method.on_message(topic, payload)

    def stop(self) -> None:
        """End the thread, and wait for it a while."""
        self._closing.set()
        self._side_tasks.wake()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _begin(self, plan: Plan) -> None:
        """Labels are fixed and the tier is settled: everything but computing starts here."""
        tier = plan.tiers[self._context.tier]
        self._codebooks = CodebooksInbox(self._context.outbox.folder, self._reference(tier))
        if not self._codebooks.look(tier):
            self._subscribe(Topics(plan.job).codebooks_filter(self._context.tier))
        self._link.begin(plan.flow)
        self._method = METHODS[type(plan.method)](
            *(self._context, plan, self._link),
            side_tasks=self._side_tasks,
            stopped=self._stopped,
            on_adopted=self._on_news,
        )
        self._ready.set()
        for topic in self._method.topics(Topics(plan.job)):
            self._subscribe(topic)
        self._weights.begin(plan.run, self._method.adopter, every=self._method.needs_every)
        self._side_tasks.wake()

    # --- its thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._compute()
            while not self._stopped():
                self._side_tasks.wait(_LOOK_S)
        except BaseException as exc:
            self.failure = exc
            self._on_news()

    def _compute(self) -> None:
        """Load the backbone, wait until the job is ready, work off the source."""
        context, plan = self._context, self._plans.plan
        assert plan is not None
        check_modality(self._source, plan.task)
        tier = plan.tiers[context.tier]
        if self._plans.ready and self._weights.newest is not None:
            self._await(lambda: self.in_use is not None, _ADOPT_FIRST_S)
        while plan.method.awaits_cut(tier):  # the trainer decides how much of the model this device has
            if self._stopped():
                return
            self._side_tasks.wait(_LOOK_S)
            plan = self._plans.plan or plan
            tier = plan.tiers.get(context.tier, tier)
        headless = TASKS[plan.task].generates and not plan.method.needs_head(plan.task)
        purpose = Task.TEXT_CLASSIFICATION if headless else plan.task
        backbone = context.load_backbone(self._reference(tier), tier.layers, tier.precision, purpose)
        backbone.check_head(tier.head)
        backbone.check_inputs(self._source.first_inputs())
        self._on_backbone(backbone)
        if not self._await(self._ready.is_set):
            return
        self._plans.check_backbone(backbone)
        assert self._method is not None and self._codebooks is not None
        if not self._await(self._codebooks.found.is_set):
            return
        self._method.work_off(self._source, backbone)
        if not self._stopped():
            self.produced = True
            self._on_news()

    def _await(self, what: Callable[[], bool], most_s: float = float("inf")) -> bool:
        """Do nothing but side tasks until something is so, for so long at most; False if stopped before."""
        until_s = time.monotonic() + most_s
        while not what() and not self._stopped() and time.monotonic() < until_s:
            self._side_tasks.wait(_LOOK_S)
        return not self._stopped()

    def _reference(self, tier: TierPlan) -> str:
        return self._context.config.backbone or tier.backbone

    def _stopped(self) -> bool:
        return self._closing.is_set() or self._context.stop.is_set()
