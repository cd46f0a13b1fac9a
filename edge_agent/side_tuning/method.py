"""Samples become batches of sampled activations; weights are the side-network that answers with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from edge_agent.batches.late_labels import LateLabels
from edge_agent.batches.producer import Producer
from edge_agent.batches.rungs import Rungs
from edge_agent.batches.token_maker import TokenMaker, maker_of
from edge_agent.method import DeviceMethod
from edge_agent.samples.source import SampleSource
from edge_agent.side_tuning.reading import read_side_network
from edge_agent.weights.adoption import Adopter
from edge_agent.weights.evaluation import EvaluationSet
from edge_agent.weights.token_evaluation import TokenEvaluation
from sidestream.backbone.backbone import Backbone
from sidestream.contract.tasks import TASKS


class SideTuningDevice(DeviceMethod):
    """See the module."""

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
        )

    def side_work(self) -> Iterator[tuple[str, Callable[[], None]]]:
        if TASKS[self.plan.task].generates:  # a language model's truth is its text: no label is waited for
            return
        late_labels = LateLabels(
            self.context.outbox,
            self.plan,
            self.context.tier,
            max_message_bytes=self.link.max_message_bytes,
            stopped=self.stopped,
            on_batch=self.link.wake,
        )
        yield "labels", late_labels.run

    def work_off(self, source: SampleSource, backbone: Backbone) -> None:
        context = self.context
        self.adopter.evaluate_with(self._evaluation(backbone))
        rungs = Rungs(
            backbone,
            self.plan,
            context.tier,
            self.link.max_message_bytes,
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
            stopped=self.stopped,
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
