"""The work of one session: computing, sending, adopting, and taking up labels that came later.

Each has a thread of its own. The backbone is loaded as soon as the plan names one; the rest begins once the
plan is ready for the device's tier. Hears no messages: the session does, and tells.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from broker_config.transport import Transport
from edge_agent.batches.late_labels import LateLabels
from edge_agent.batches.producer import Producer
from edge_agent.batches.token_maker import TokenMaker, maker_of
from edge_agent.samples.sources import Source
from edge_agent.session.device import Device
from edge_agent.session.plan_inbox import PlanInbox
from edge_agent.session.sender import Sender
from edge_agent.weights.adoption import Adopter, InUse
from edge_agent.weights.evaluation import EvaluationSet
from edge_agent.weights.token_evaluation import TokenEvaluation
from edge_agent.weights.weights_inbox import WeightsInbox
from sidestream.backbone.backbone import Backbone
from sidestream.contract.messages import Flow
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.tasks import TASKS
from sidestream.contract.wire import TARGET_MESSAGE_BYTES

_TICK_S = 0.1
_ADOPT_FIRST_S = 2.0  # loading the backbone waits so long for retained weights: it would hold them up
_JOIN_S = 15.0


class Work:
    """The threads, and what goes to them. Belongs to the session's thread.

    Args:
        device: Whose work it is.
        source: Its samples.
        transport: Where batches go,
        topic: and on what topic.
        plans: The plan in force.
        weights: Told when versions are wanted.
        on_backbone: Called on a thread of the work's own once the backbone is loaded.
        on_news: Likewise, when there is something to report: an adoption, a measurement, the end of the data.
        on_refused: Likewise, when weights failed a check.
    """

    def __init__(
        self,
        device: Device,
        source: Source,
        transport: Transport,
        topic: str,
        *,
        plans: PlanInbox,
        weights: WeightsInbox,
        on_backbone: Callable[[Backbone], None],
        on_news: Callable[[], None],
        on_refused: Callable[[], None],
    ) -> None:
        self.failure: BaseException | None = None
        """What ended the first thread that failed."""
        self.produced = False
        """Whether the data has ended and all of it is computed."""
        self.max_packet_bytes = 0
        """The broker's limit."""
        self._device = device
        self._source = source
        self._transport = transport
        self._topic = topic
        self._plans = plans
        self._weights = weights
        self._on_backbone = on_backbone
        self._on_news = on_news
        self._on_refused = on_refused
        self._flow: Flow | None = None
        self._connected = False
        self._waits = False
        self._sender: Sender | None = None
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

    @property
    def unanswered_s(self) -> float:
        """For how long batches have been sent without any receipt."""
        return self._sender.unanswered_s if self._sender is not None else 0.0

    # --- what the session tells --------------------------------------------------------------------------

    def on_plan(self, plan: Plan, tier: TierPlan) -> None:
        """A plan that knows the device's tier is in force: do what it lets be done."""
        if not self._threads:
            self._start(self._compute, "producer")
        if self._plans.ready and not self.begun:
            self._begin(plan, tier)

    def connection(self, up: bool) -> None:
        """The connection came up or went down."""
        self._connected = up
        if self._sender is not None:
            self._sender.connection(up)

    def set_flow(self, flow: Flow) -> None:
        """The trainer changed the rate."""
        self._flow = flow
        if self._sender is not None:
            self._sender.set_flow(flow)

    def set_waits(self, waits: bool) -> None:
        """The trainer has no room for what this device sends, or has some again."""
        self._waits = waits
        if self._sender is not None:
            self._sender.set_waits(waits)

    def receipted(self, sequences: Sequence[int]) -> None:
        """These batches have left the outbox on a receipt."""
        if self._sender is not None:
            self._sender.receipted(sequences)

    def send_again(self) -> None:
        """A batch was given up: repeat what is under way."""
        if self._sender is not None:
            self._sender.send_again()

    def stop(self) -> None:
        """End the threads, and wait for them a while."""
        self._closing.set()
        for worker in (self._sender, self._adopter):
            if worker is not None:
                worker.stop()
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # --- threads -----------------------------------------------------------------------------------------

    def _begin(self, plan: Plan, tier: TierPlan) -> None:
        """Labels are fixed and the tier is settled: everything but computing starts here."""
        device = self._device
        self._adopter = Adopter(
            device.outbox.folder,
            plan,
            device.tier,
            backbone=self._reference(tier),
            on_change=self._on_adopted,
            on_refused=self._on_refused,
            metrics=device.metrics,
            trace=device.trace,
            trust=device.trust,
        )
        self._sender = Sender(
            device.outbox,
            self._transport,
            self._topic,
            flow=self._flow or Flow(window=plan.flow.window),
            retry_s=plan.flow.retry_s,
            metrics=device.metrics,
            trace=device.trace,
            link=device.link,
            clock=device.clock,
        )
        self._sender.connection(self._connected)
        self._sender.set_waits(self._waits)
        self._ready.set()
        self._start(self._adopter.run, "adopter")
        self._start(self._sender.run, "sender")
        if not TASKS[plan.task].generates:
            late_labels = LateLabels(
                device.outbox,
                plan,
                device.tier,
                max_message_bytes=self._max_message_bytes,
                stopped=self._stopped,
                on_batch=self._sender.wake,
            )
            self._start(late_labels.run, "labels")
        self._weights.begin(plan.run, self._adopter)

    def _on_adopted(self) -> None:
        self._on_news()
        self._adopted.set()

    def _compute(self) -> None:
        """The producer's thread: load the backbone, wait until the job is ready, work off the source."""
        device, plan = self._device, self._plans.plan
        assert plan is not None
        tier = plan.tiers[device.tier]
        if self._plans.ready and self._weights.newest is not None:
            self._adopted.wait(_ADOPT_FIRST_S)
        backbone = device.load_backbone(self._reference(tier), tier.layers, tier.precision, plan.task)
        backbone.check_head(tier.head)
        backbone.check_texts(self._source.first_texts())
        self._on_backbone(backbone)
        while not self._ready.wait(_TICK_S):
            if self._stopped():
                return
        self._plans.check_backbone(backbone)
        plan, adopter, sender = self._plans.plan, self._adopter, self._sender
        assert plan is not None and adopter is not None and sender is not None
        adopter.evaluate_with(self._evaluation(plan, backbone))
        Producer(
            self._source,
            device.outbox,
            backbone,
            plan,
            device.tier,
            held_out_share=device.held_out_share,
            poll_s=device.config.data.poll_s,
            max_message_bytes=self._max_message_bytes,
            stopped=self._stopped,
            on_batch=sender.wake,
            metrics=device.metrics,
            trace=device.trace,
            bytes_per_sample=device.config.bytes_per_sample,
            link=device.link,
        ).run()
        if not self._stopped():
            self.produced = True
            self._on_news()

    def _evaluation(self, plan: Plan, backbone: Backbone) -> EvaluationSet:
        device, data = self._device, self._device.config.data
        limit, given = data.evaluation_max_samples, device.evaluation_rows
        rows = (lambda: given) if given is not None else (lambda: device.outbox.held_out(limit))
        maker = maker_of(backbone, plan, device.tier, self._max_message_bytes)
        if isinstance(maker, TokenMaker):
            return TokenEvaluation(maker, rows, data.evaluation_max_tokens, stopped=self._stopped)
        codec = plan.tiers[device.tier].codec
        return EvaluationSet(maker, codec, plan.task, rows, stopped=self._stopped)

    def _reference(self, tier: TierPlan) -> str:
        return self._device.config.backbone or tier.backbone

    @property
    def _max_message_bytes(self) -> int:
        return min(TARGET_MESSAGE_BYTES, self.max_packet_bytes - 512)

    def _stopped(self) -> bool:
        return self._closing.is_set() or self._device.stop.is_set()

    def _start(self, work: Callable[[], None], name: str) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as exc:
                self.failure = self.failure or exc

        thread = threading.Thread(target=guarded, name=f"{name}-{self._device.name}", daemon=True)
        self._threads.append(thread)
        thread.start()
