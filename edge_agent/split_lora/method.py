"""The split methods on a device: its first layers are computed here, all others by the trainer."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from edge_agent.batches.patience import Patience
from edge_agent.method import DeviceMethod
from edge_agent.samples.source import SampleSource
from edge_agent.split_lora.adapters import DeviceAdapters, HeldAdapters, OwnAdapters
from edge_agent.split_lora.departures import Departures
from edge_agent.split_lora.evaluation import SplitEvaluation
from edge_agent.split_lora.exchange import Exchange
from edge_agent.split_lora.frozen import FrozenUpload
from edge_agent.split_lora.intake import BatchIntake
from edge_agent.split_lora.prepared import Preparer
from edge_agent.split_lora.reading import read_adapters
from edge_agent.split_lora.stored_batches import StoredBatches
from edge_agent.split_lora.writing import Writer
from edge_agent.weights.adoption import Adopter
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import DecodeError, UntrustedError
from sidestream.contract.messages import GradientReply
from sidestream.contract.plan import SplitLora
from sidestream.contract.topics import Topics
from sidestream.split_model.loading import Lower, local_steps, lower_half

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What both methods send batches with."""

    preparer: Preparer
    writer: Writer
    batches: StoredBatches
    intake: BatchIntake
    departures: Departures
    patience: Patience


class SplitDevice(DeviceMethod):
    """What the split methods have in common."""

    def make_adopter(self) -> Adopter:
        context = self.context
        return Adopter(
            context.outbox.folder,
            self.plan,
            context.tier,
            backbone=context.config.backbone or self.tier.backbone,
            read=partial(read_adapters, plan=self.plan, tier=context.tier),
            on_change=self.on_adopted,
            on_refused=partial(context.outbox.count, "weights_refused", 1),
            metrics=context.metrics,
            trace=context.trace,
            trust=context.trust,
            wake=self.side_tasks.wake,
        )

    def work_off(self, source: SampleSource, backbone: Backbone) -> None:
        parts = self._parts(source, backbone)
        context = self.context
        self.adopter.evaluate_with(SplitEvaluation(context, self.plan, parts.preparer, stopped=self.stopped))
        (cut, *_) = parts.patience.write(partial(parts.batches.rewrite, parts.preparer.shortened)) or (0,)
        if cut:
            log.info("%d batches are cut to max_tokens = %d of the plan", cut, self.tier.max_tokens)
        self._run(parts, backbone)

    @abstractmethod
    def _run(self, parts: _Parts, backbone: Backbone) -> None:
        """Send batches until the source has ended and all is done."""

    @property
    def _passes(self) -> int:
        return 1

    @property
    def _reuse_below(self) -> float:
        return 0.0

    def _parts(self, source: SampleSource, backbone: Backbone) -> _Parts:
        context, tier = self.context, self.context.tier
        patience = self.patience()
        preparer, writer = Preparer(backbone, self.plan, tier), Writer(self.plan, tier)
        batches = StoredBatches(context.outbox, self._passes)
        intake = BatchIntake(
            *(source, context.outbox, preparer, writer, batches),
            batch_size=self.tier.batch_size,
            max_message_bytes=self.link.max_message_bytes,
            held_out_share=context.held_out_share,
            patience=patience,
        )
        departures = Departures(
            *(context, batches, writer),
            reuse_below=self._reuse_below,
            patience=patience,
            on_batch=self.link.wake,
        )
        return _Parts(
            preparer=preparer,
            writer=writer,
            batches=batches,
            intake=intake,
            departures=departures,
            patience=patience,
        )


class SplitFrozenDevice(SplitDevice):
    """Each sample is forwarded and sent once, and nothing comes back."""

    def _run(self, parts: _Parts, backbone: Backbone) -> None:
        FrozenUpload(
            *(self.context, backbone, parts.intake, parts.batches, parts.departures),
            pad=parts.preparer.pad,
            patience=parts.patience,
        ).run()


class SplitLoraDevice(SplitDevice):
    """Every batch is answered."""

    needs_every = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._replies: SimpleQueue[GradientReply] = SimpleQueue()
        self._prefix = ""

    @property
    def split(self) -> SplitLora:
        """The plan's part."""
        assert isinstance(self.plan.method, SplitLora)
        return self.plan.method

    def topics(self, topics: Topics) -> Sequence[str]:
        self._prefix = topics.gradients_filter(self.context.tier, self.context.name)[:-1]
        return (topics.gradients_filter(self.context.tier, self.context.name),)

    def on_message(self, topic: str, payload: bytes) -> None:
        if not topic.startswith(self._prefix):
            raise DecodeError(f"not a topic of this device's: {topic[:200]!r}")
        try:
            reply = self.context.trust.open_reply(payload, self.context.name)
        except UntrustedError as exc:
            self.context.outbox.count("weights_refused", 1)
            raise DecodeError(f"an answer is not the trainer's: {exc}") from exc
        if reply.run == self.plan.run:
            self._replies.put(reply)
            self.side_tasks.wake()

    @property
    def _passes(self) -> int:
        return self.split.passes

    @property
    def _reuse_below(self) -> float:
        return self.split.reuse_below if self.split.passes > 1 else 0.0

    def _run(self, parts: _Parts, backbone: Backbone) -> None:
        lower = lower_half(backbone, self.split.lora)
        Exchange(
            *(self.context, self.split.window, parts.intake, parts.batches, parts.departures),
            *(parts.writer, self._adapters(lower, parts)),
            replies=self._replies,
            pad=parts.preparer.pad,
            patience=parts.patience,
            on_batch=self.link.wake,
        ).run()

    def _adapters(self, lower: Lower, parts: _Parts) -> DeviceAdapters:
        if self.split.adapters == "held":
            return HeldAdapters(
                *(lower, self.adopter, parts.writer, self.context.outbox),
                in_step=self.split.window == 1,
                clock=self.context.clock,
            )
        plan = self.split.round
        return OwnAdapters(
            *(lower, self.adopter, parts.writer, local_steps(lower, plan), plan, self.context.outbox),
            patience=parts.patience,
            on_batch=self.link.wake,
        )
