"""The two ends of a split job without a network: the agents' and the trainer's own rooms, by hand.

Outbox, halves, journal and fold are the real ones, and what they say is packed as it travels. Whoever has
these ends carries messages between them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, cast

import msgspec
from prometheus_client import CollectorRegistry

from benchmarks.fleet import FleetDevice
from benchmarks.workload import JOB, write_examples
from broker_config.testing.inprocess import InProcessBroker
from edge_agent.batches.patience import Patience
from edge_agent.batches.side_tasks import SideTasks
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.context import AgentContext
from edge_agent.samples.sources import open_source
from edge_agent.split_lora.adapters import DeviceAdapters, HeldAdapters, OwnAdapters
from edge_agent.split_lora.departures import Departures
from edge_agent.split_lora.exchange import Exchange
from edge_agent.split_lora.frozen import FrozenUpload
from edge_agent.split_lora.intake import BatchIntake
from edge_agent.split_lora.prepared import Preparer
from edge_agent.split_lora.stored_batches import StoredBatches
from edge_agent.split_lora.writing import Writer
from edge_agent.store.outbox import Outbox
from edge_agent.weights.adoption import Adopter, InUse
from edge_agent.weights.trust import Trust
from metrics.catalogue import AgentMetrics
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import RecordKind
from side_trainer.receive.adapter_messages import examine_adapter
from side_trainer.receive.inbox import arrived, examine
from side_trainer.settings.schema import TrainerConfig
from side_trainer.split_lora.frozen import SplitFrozenMethod
from side_trainer.split_lora.split import SplitMethod
from sidestream.backbone.runtimes import shared_backbone
from sidestream.contract.messages import GradientReply, Receipt, is_adapter_message
from sidestream.contract.plan import Plan, SplitLora
from sidestream.contract.tensors import Floats
from sidestream.host.trace import Trace
from sidestream.split_model.adapter_bundle import decode_adapters
from sidestream.split_model.loading import Lower, local_steps, lower_half

BACKWARD: Final = 2.0
"""A backward pass, in forward passes."""
_A_MOMENT: Final = 1e-6


def passes_of(plan: Plan) -> int:
    """How often devices forward each sample."""
    return plan.method.passes if isinstance(plan.method, SplitLora) else 1


class TrainerEnd:
    """Journal, fold and what is told to devices.

    Args:
        config: Settings.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self.config = config
        folder = Path(config.state_dir)
        folder.mkdir(parents=True)
        self.journal = Journal(folder / FILE_NAME)
        self.plan: Plan = Job(config, self.journal).plan
        self.fold = Fold(self.journal)
        self.replies: deque[tuple[str, GradientReply]] = deque()
        self.staleness: list[int] = []
        self.cpu_s = 0.0
        self.versions = 0
        self._before: dict[str, Floats] = {}
        self.catch_up()

    @property
    def method(self) -> SplitMethod:
        assert isinstance(self.fold.method, SplitMethod)
        return self.fold.method

    def take(self, device: FleetDevice, payload: bytes) -> Receipt:
        """Journal a message."""
        read = examine_adapter if is_adapter_message(payload) else examine
        batch = read(payload, device.tier, self.plan).batch
        with self.journal.transaction():
            self.journal.append_batch(arrived(batch, payload, device.tier, device.name))
        state = self.journal.stream(batch.stream)
        assert state is not None
        upto = state.watermark
        return Receipt(
            stream=batch.stream, upto=upto, digest=self.journal.content(batch.stream, upto), fence=1
        )

    def catch_up(self) -> None:
        """Fold what is there."""
        while records := self.journal.read(self.fold.offset, limit=16):
            for record in records:
                step = self.fold.apply(record)
                if record.kind == RecordKind.UPDATE.value:
                    self.staleness.append(step.staleness or 0)
                for reply in step.replies:
                    state = self.journal.stream(reply.stream)
                    assert state is not None
                    self.replies.append((state.device, reply.message))

    def serve(self, now: float) -> bool:
        """Do one thing that the method owes; return whether it owed any."""
        own = self.method.next_own(now)
        if own is not None:
            self.journal.append(own[0].value, own[1])
            self.catch_up()
        return own is not None

    def idle(self) -> bool:
        """Go on with the passes over the journal; return whether any are owed."""
        settings, method = self.config.learner, self.method
        if method.owed(settings.passes) <= 0:
            return False
        record = method.next_idle(settings.passes, settings.pass_rows, self.fold.offset)
        self.journal.append(RecordKind.IDLE.value, msgspec.json.encode(record))
        self.catch_up()
        return True

    def release(self) -> dict[str, bytes]:
        """New adapters by tier, if they are to be published."""
        method = self.method
        if not method.has_weights or isinstance(method, SplitFrozenMethod):
            return {}
        now = method.weights()
        if self._before and method.moved_by(self._before, now) < self.config.publish_change:
            return {}
        self._before = now
        self.versions += 1
        version = self.journal.version_base + self.fold.offset
        return dict(method.bundles(self.journal.run, version, self.config.weights_codec))


@dataclass
class _Adopted:
    """What a device's half asks its adopter for."""

    in_use: InUse | None = None


class DeviceEnd:
    """One device: its exchange, and what it waits for.

    Args:
        about: Its name, tier and data.
        plan: The job.
        folder: For its state.
        message_bytes: No message is larger.
        pace: Slows its half down.
    """

    def __init__(
        self,
        about: FleetDevice,
        plan: Plan,
        folder: Path,
        message_bytes: int,
        pace: Callable[[Lower], Lower] = lambda lower: lower,
    ) -> None:
        folder.mkdir(parents=True)
        self.about = about
        self.clock = 0.0
        self.cpu_s = 0.0
        self.done = False
        self.batches = 0
        self.held_back: deque[GradientReply] = deque()
        self.replies: SimpleQueue[GradientReply] = SimpleQueue()
        self.adopted = _Adopted()
        self._plan = plan
        tier, method = plan.tiers[about.tier], plan.method
        self.cut = tier.layers
        self.outbox = Outbox(folder, job=JOB, device=about.name, tier=about.tier, max_bytes=2**30)
        self.outbox.begin_run(plan.run)
        data = DataConfig(path=str(write_examples(folder / "data.jsonl", about.examples)), held_out_share=0.0)
        context = _context(self.outbox, data)
        backbone = shared_backbone(tier.backbone, tier.layers, "f32", plan.task)
        patience = Patience("computing waits", lambda: False, SideTasks())
        preparer, writer = Preparer(backbone, plan, about.tier), Writer(plan, about.tier)
        passes = passes_of(plan)
        batches = StoredBatches(self.outbox, passes)
        self.source = open_source(data, folder)
        intake = BatchIntake(
            *(self.source, self.outbox, preparer, writer, batches),
            batch_size=tier.batch_size,
            max_message_bytes=message_bytes,
            held_out_share=0.0,
            patience=patience,
        )
        reuse = method.reuse_below if isinstance(method, SplitLora) and passes > 1 else 0.0
        departures = Departures(
            *(context, batches, writer), reuse_below=reuse, patience=patience, on_batch=lambda: None
        )
        self._frozen: FrozenUpload | None = None
        self._exchange: Exchange | None = None
        self._intake, self._batches = intake, batches
        if not isinstance(method, SplitLora):
            parts = (context, backbone, intake, batches, departures)
            self._frozen = FrozenUpload(*parts, pad=preparer.pad, patience=patience)
            return
        lower = pace(lower_half(backbone, method.lora))
        adopter = cast(Adopter, self.adopted)
        adapters: DeviceAdapters = HeldAdapters(
            *(lower, adopter, writer, self.outbox),
            in_step=method.window == 1,
            clock=context.clock,
        )
        if method.adapters == "local":
            adapters = OwnAdapters(
                *(lower, adopter, writer, local_steps(lower, method.round), method.round, self.outbox),
                patience=patience,
                on_batch=lambda: None,
            )
        self._exchange = Exchange(
            *(context, method.window, intake, batches, departures, writer, adapters),
            replies=self.replies,
            pad=preparer.pad,
            patience=patience,
            on_batch=lambda: None,
        )

    def step(self) -> bool:
        """Do what can be done now; return whether there was anything. The clock goes on."""
        began, before = time.thread_time(), self._batches.done
        answers = self.replies.qsize()
        busy = self._step()
        self.cpu_s += time.thread_time() - began
        sent = self._batches.done - before
        self.batches += sent
        passes = sent + BACKWARD * answers
        self.clock += max(self.cut * passes / self.about.speed, _A_MOMENT)
        return busy

    def _step(self) -> bool:
        if self._exchange is not None:
            busy = self._exchange._step()
            self.done = not busy and self._exchange._is_done()
            return busy
        assert self._frozen is not None
        busy = False if self._intake.ended else self._intake.read()
        busy = self._frozen._send_next() or busy
        self.done = not busy
        return busy

    def hear(self, late: int) -> None:
        """What has been held back for long enough reaches it."""
        while len(self.held_back) > late:
            self.replies.put(self.held_back.popleft())

    def adopt(self, version: int, bundle: bytes) -> None:
        self.adopted.in_use = InUse(self._plan.run, version, "", decode_adapters(bundle), None)

    def close(self) -> None:
        self.source.close()
        self.outbox.close()


def _context(outbox: Outbox, data: DataConfig) -> AgentContext:
    return AgentContext(
        config=AgentConfig(job=JOB, data=data),
        instance="",
        client_id="",
        outbox=outbox,
        evaluation_rows=(),
        stream=None,
        connect=lambda *_: InProcessBroker().transport(""),
        load_backbone=lambda *_: shared_backbone(""),
        metrics=AgentMetrics(CollectorRegistry()),
        stop=cast(Any, None),
        trace=Trace(),
        trust=cast(Trust, None),
    )
