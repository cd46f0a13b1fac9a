"""The work of one session: computing, sending, adopting, and what else its method does.

Each has a thread of its own. The backbone is loaded as soon as the plan names one; the rest begins once the
plan is ready for the device's tier. Hears no messages: the session does, and tells.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edge_agent.context import AgentContext
from edge_agent.method import DeviceMethod
from edge_agent.method_registry import METHODS
from edge_agent.samples.source import SampleSource, check_modality
from edge_agent.session.plan_inbox import PlanInbox
from edge_agent.uplink.link_state import LinkState
from edge_agent.uplink.sender import Sender
from edge_agent.weights.adoption import InUse
from edge_agent.weights.codebooks import CodebooksInbox
from edge_agent.weights.weights_inbox import WeightsInbox
from sidestream.backbone.backbone import Backbone
from sidestream.contract.messages import CodebooksChunk
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack

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
        subscribe: Listens to a topic.
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
        subscribe: Callable[[str], None],
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
        self._subscribe = subscribe
        self._on_backbone = on_backbone
        self._on_news = on_news
        self._codebooks: CodebooksInbox | None = None
        self._method: DeviceMethod | None = None
        self._threads: list[threading.Thread] = []
        self._ready = threading.Event()
        self._adopted = threading.Event()
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
        if not self._threads:
            self._start(self._compute, "producer")
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
        elif self._method is not None:
            self._method.on_message(topic, payload)

    def stop(self) -> None:
        """End the threads, and wait for them a while."""
        self._closing.set()
        self._sender.stop()
        if self._method is not None:
            self._method.adopter.stop()
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # --- threads -----------------------------------------------------------------------------------------

    def _begin(self, plan: Plan) -> None:
        """Labels are fixed and the tier is settled: everything but computing starts here."""
        tier = plan.tiers[self._context.tier]
        self._codebooks = CodebooksInbox(self._context.outbox.folder, self._reference(tier))
        if not self._codebooks.look(tier):
            self._subscribe(Topics(plan.job).codebooks_filter(self._context.tier))
        self._link.begin(plan.flow)
        self._method = METHODS[type(plan.method)](
            self._context, plan, self._link, stopped=self._stopped, on_adopted=self._on_adopted
        )
        self._ready.set()
        for topic in self._method.topics(Topics(plan.job)):
            self._subscribe(topic)
        self._start(self._method.adopter.run, "adopter")
        self._start(self._sender.run, "sender")
        for name, side_work in self._method.side_work():
            self._start(side_work, name)
        self._weights.begin(plan.run, self._method.adopter, every=self._method.needs_every)

    def _on_adopted(self) -> None:
        self._on_news()
        self._adopted.set()

    def _compute(self) -> None:
        """The producer's thread: load the backbone, wait until the job is ready, work off the source."""
        context, plan = self._context, self._plans.plan
        assert plan is not None
        check_modality(self._source, plan.task)
        tier = plan.tiers[context.tier]
        if self._plans.ready and self._weights.newest is not None:
            self._adopted.wait(_ADOPT_FIRST_S)
        while plan.method.awaits_cut(tier):  # the trainer decides how much of the model this device has
            if self._stopped():
                return
            time.sleep(_TICK_S)
            plan = self._plans.plan or plan
            tier = plan.tiers.get(context.tier, tier)
        headless = TASKS[plan.task].generates and not plan.method.needs_head(plan.task)
        purpose = Task.TEXT_CLASSIFICATION if headless else plan.task
        backbone = context.load_backbone(self._reference(tier), tier.layers, tier.precision, purpose)
        backbone.check_head(tier.head)
        backbone.check_inputs(self._source.first_inputs())
        self._on_backbone(backbone)
        while not self._ready.wait(_TICK_S):
            if self._stopped():
                return
        self._plans.check_backbone(backbone)
        assert self._method is not None and self._codebooks is not None
        while not self._codebooks.found.wait(_TICK_S):
            if self._stopped():
                return
        self._method.work_off(self._source, backbone)
        if not self._stopped():
            self.produced = True
            self._on_news()

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
