"""Samples become batches of sampled activations; weights are the side-network that answers with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from edge_agent.batches.assigned import Assigned
from edge_agent.batches.late_labels import LateLabels
from edge_agent.batches.producer import Producer
from edge_agent.batches.rungs import Rungs
from edge_agent.batches.side_tasks import SideTasks
from edge_agent.batches.token_maker import TokenMaker, maker_of
from edge_agent.context import AgentContext
from edge_agent.method import DeviceMethod
from edge_agent.samples.source import SampleSource
from edge_agent.side_tuning.reading import read_side_network
from edge_agent.uplink.link_state import LinkState
from edge_agent.weights.adoption import Adopter
from edge_agent.weights.evaluation import EvaluationSet
from edge_agent.weights.token_evaluation import TokenEvaluation
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import WireError
from sidestream.contract.plan import Plan
from sidestream.contract.tasks import TASKS
from sidestream.contract.topics import Topics
from sidestream.host.state_dir import write_atomically

_ASSIGNMENT = "assignment.msgpack"
log = logging.getLogger(__name__)


class SideTuningDevice(DeviceMethod):
    """See the module."""

    def __init__(
        self,
        context: AgentContext,
        plan: Plan,
        link: LinkState,
        *,
        side_tasks: SideTasks,
        stopped: Callable[[], bool],
        on_adopted: Callable[[], None],
    ) -> None:
        super().__init__(
            *(context, plan, link), side_tasks=side_tasks, stopped=stopped, on_adopted=on_adopted
        )
        if not TASKS[plan.task].generates:  # a language model's truth is its text: no label is waited for
            side_tasks.add(self._late_labels().turn)
        self._assigned = Assigned(plan, context.tier)
        self._kept = context.outbox.folder / _ASSIGNMENT
        if self._assigned.bounds is not None:  # a start goes on by it, before the broker has said anything
            with suppress(OSError, WireError):
                self._take(self._kept.read_bytes())

    def make_adopter(self) -> Adopter:
        context = self.context
        return Adopter(
            context.outbox.folder,
            self.plan,
            context.tier,
            backbone=context.config.backbone or self.tier.backbone,
            read=partial(read_side_network, plan=self.plan, tier=context.tier),
            on_change=self.on_adopted,
            on_refused=partial(context.outbox.count, "weights_refused", 1),
            metrics=context.metrics,
            trace=context.trace,
            trust=context.trust,
            wake=self.side_tasks.wake,
        )

    @property
    def assignment(self) -> int:
        return self._assigned.version

    def topics(self, topics: Topics) -> Sequence[str]:
        return [self._topic(topics)] if self._assigned.bounds is not None else []

    def _topic(self, topics: Topics) -> str:
        return topics.assignment(self.context.tier, self.context.name)

    def on_message(self, topic: str, payload: bytes) -> None:
        if topic != self._topic(Topics(self.plan.job)):
            super().on_message(topic, payload)
        try:
            self._take(payload)
        except WireError as exc:
            self.context.outbox.count("assignments_refused", 1)
            log.error("an assignment is not taken: %s", exc)
            return
        try:
            write_atomically(self._kept, payload)
        except OSError as exc:
            log.error("%s cannot be written, a restart waits for the broker's: %s", self._kept, exc)

    def _take(self, payload: bytes) -> None:
        """Go by an assignment.

        Raises:
            WireError: it is not the trainer's, or not one that this device may take.
        """
        if self._assigned.take(self.context.trust.open_assignment(payload, self.context.name)):
            way = self._assigned.way
            rung = f", {way.rung.sampling} {way.rung.codec.value}" if way.rung is not None else ""
            log.info("from now on batches of %d, %d tokens%s", way.batch_size, way.max_tokens, rung)

    def _late_labels(self) -> LateLabels:
        return LateLabels(
            self.context.outbox,
            self.plan,
            self.context.tier,
            max_message_bytes=self.link.max_message_bytes,
            on_batch=self.link.wake,
        )

    def work_off(self, source: SampleSource, backbone: Backbone) -> None:
        context = self.context
        self.adopter.evaluate_with(self._evaluation(backbone))
        rungs = Rungs(
            backbone,
            self.plan,
            context.tier,
            self.link.max_message_bytes,
            assigned=self._assigned,
            bytes_per_sample=context.config.bytes_per_sample,
            link=context.budget,
            backlog=lambda: context.outbox.size()[1],
        )
        Producer(
            source,
            context.outbox,
            rungs,
            held_out_share=context.held_out_share,
            poll_s=context.config.data.poll_s,
            patience=self.patience(),
            on_batch=self.link.wake,
            metrics=context.metrics,
            trace=context.trace,
        ).run()

    def _evaluation(self, backbone: Backbone) -> EvaluationSet:
        context, data = self.context, self.context.config.data
        limit, given = data.evaluation_max_samples, context.evaluation_rows
        rows = (lambda: given) if given is not None else (lambda: context.outbox.held_out(limit))
        maker = maker_of(backbone, self.plan, context.tier, self.link.max_message_bytes)
        if isinstance(maker, TokenMaker):
            return TokenEvaluation(maker, rows, data.evaluation_max_tokens, stopped=self.stopped)
        return EvaluationSet(maker, self.plan.task, rows, stopped=self.stopped)
