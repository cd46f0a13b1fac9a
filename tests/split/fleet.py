"""A split job by hand: real outboxes, halves, journal, fold and answers, and a network that is this file.

Nothing runs by itself. A test has devices and trainer make one step at a time, and may kill either at every
point at which something has just become durable or is about to.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import msgspec
from prometheus_client import CollectorRegistry

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.batches.patience import Patience
from edge_agent.batches.side_tasks import SideTasks
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.context import AgentContext
from edge_agent.samples.sources import open_source
from edge_agent.split_lora.adapters import DeviceAdapters, HeldAdapters, OwnAdapters
from edge_agent.split_lora.departures import Departures
from edge_agent.split_lora.exchange import Exchange
from edge_agent.split_lora.intake import BatchIntake
from edge_agent.split_lora.prepared import Preparer
from edge_agent.split_lora.stored_batches import StoredBatches
from edge_agent.split_lora.writing import Writer
from edge_agent.store.outbox import Outbox
from edge_agent.weights.adoption import Adopter, InUse
from edge_agent.weights.trust import Trust
from metrics.catalogue import AgentMetrics, TrainerMetrics
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.replies import Replies
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.fold.checkpoint import resume, write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Claim, Journal
from side_trainer.receive.adapter_messages import examine_adapter
from side_trainer.receive.inbox import arrived, examine
from side_trainer.settings.schema import LearnerSettings, TrainerConfig
from side_trainer.settings.split import SplitConfig
from side_trainer.settings.tier import TierConfig
from side_trainer.split_lora.method import SplitLoraMethod
from sidestream.backbone.runtimes import shared_backbone
from sidestream.contract.messages import GradientReply, Receipt, is_adapter_message
from sidestream.contract.plan import Plan, SplitLora
from sidestream.contract.tensors import Codec
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack
from sidestream.host.trace import Trace
from sidestream.split_model.adapter_bundle import decode_adapters
from sidestream.split_model.loading import local_steps, lower_half

JOB = "lights"
LABELS = ("off", "on")
TOPICS = Topics(JOB)
WORDS = {"on": ["turn", "on", "warm", "heat", "up"], "off": ["switch", "off", "cold", "down", "end"]}


class Killed(BaseException):
    """The process is gone."""


class Fate:
    """Kills whoever asks, now and then.

    Args:
        lots: Where chance comes from; None never kills.
        chance: Of each question.
    """

    def __init__(self, lots: random.Random | None = None, chance: float = 0.0) -> None:
        self.lots = lots
        self.chance = chance
        self.kills = 0

    def __call__(self) -> None:
        """Survive, or not."""
        if self.lots is not None and self.lots.random() < self.chance:
            self.kills += 1
            raise Killed


class _Link:
    """A connection that is always there, to devices that listen or not."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.sent: list[tuple[str, bytes]] = []

    active = True

    def publish(self, topic: str, payload: bytes, **options: Any) -> None:
        if payload:
            self.retained[topic] = payload
        else:
            self.retained.pop(topic, None)
        self.sent.append((topic, payload))


class _FatefulTrace(Trace):
    def __init__(self, fate: Fate) -> None:
        self._fate = fate

    def add(self, name: str, lane: str, start: int, end: int | None = None, **about: object) -> None:
        self._fate()


def config(folder: Path, backbone: Path, *, cuts: Sequence[int] = (1,), **changes: Any) -> TrainerConfig:
    """Settings of a job whose tiers hold so many layers; by default all in f32, without clipping or decay."""
    split = {"passes": 1, "window": 1, "reuse_below": 0.0, "change_bits": 0, **changes.pop("split", {})}
    learner: dict[str, Any] = {
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "warmup_updates": 0,
        "final_rate": 1.0,
    }
    learner |= {"label_smoothing": 0.0, "prior_correction": 0.0, "clip_norm": 1e9}
    learner |= changes.pop("learner", {})
    codec = changes.pop("codec", Codec.F32)
    tier = {"backbone": str(backbone), "batch_size": 4, "codec": codec, "gradient_codec": codec}
    fields = {
        "job": JOB,
        "state_dir": str(folder / "trainer"),
        "method": "split-lora",
        "labels": LABELS,
        "split": SplitConfig(**split),
        "learner": LearnerSettings(**learner),
        "tiers": {f"cut{cut}": TierConfig(cut=cut, **tier) for cut in cuts},
        "weights_codec": "f32",
        **changes,
    }
    return TrainerConfig(**fields).checked()


def write_rows(path: Path, count: int, seed: str) -> Path:
    """Short texts, some longer than others."""
    lots = random.Random(seed)
    lines = []
    for _ in range(count):
        label = lots.choice(LABELS)
        words = lots.choices(WORDS[label] + ["the", "lights", "please"], k=lots.randint(2, 9))
        lines.append(json.dumps({"text": " ".join(words), "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


class SplitTrainer:
    """One life of a trainer: begun anew, it finds what the one before had made durable.

    Args:
        config: Settings.
        fate: Asked at every point at which something was or is to be written.
    """

    def __init__(self, config: TrainerConfig, fate: Fate | None = None) -> None:
        self.config = config
        self.fate = fate or Fate()
        self.folder = Path(config.state_dir)
        self.folder.mkdir(exist_ok=True)
        self.journal = Journal(self.folder / FILE_NAME)
        self.job = Job(config, self.journal)
        self.link = _Link()
        self.replies = Replies(
            self.journal,
            cast(LeaderTransport, self.link),
            TOPICS,
            TrainerSigner(JOB),
            TrainerMetrics(CollectorRegistry()),
            Trace(),
            keep_s=86400,
            patience_s=60,
        )
        self.fold = Fold(self.journal)
        resume(self.folder, self.fold, self.journal.run, self.journal.tail)
        self.refused: list[str] = []

    @property
    def plan(self) -> Plan:
        return self.job.plan

    @property
    def method(self) -> SplitLoraMethod:
        assert isinstance(self.fold.method, SplitLoraMethod)
        return self.fold.method

    def take(self, device: str, tier: str, payload: bytes) -> Receipt | None:
        """Journal a message; the receipt, unless it is refused."""
        if is_adapter_message(payload):
            found = examine_adapter(payload, tier, self.plan)
        else:
            found = examine(payload, tier, self.plan)
        self.fate()
        with self.journal.transaction():
            taken = self.journal.append_batch(arrived(found.batch, payload, tier, device))
        self.fate()
        return self.receipt(found.batch.stream, forked=taken.claim is Claim.FORKED)

    def receipt(self, stream: str, *, forked: bool = False) -> Receipt:
        """What is safe of a stream."""
        state = self.journal.stream(stream)
        assert state is not None and not forked
        upto = state.watermark
        digest = self.journal.content(stream, upto) if upto else ""
        return Receipt(stream=stream, upto=upto, digest=digest, fence=1)

    def catch_up(self) -> None:
        """Fold what is there."""
        while records := self.journal.read(self.fold.offset, limit=4):
            for record in records:
                self.fate()
                self.replies.put(self.fold.apply(record).replies)
                self.fate()
                self.replies.write()

    def serve(self, now: float = 0.0) -> bool:
        """Do what the method itself owes; return whether it owed anything."""
        self.catch_up()
        own = self.method.next_own(now)
        if own is not None:
            self.fate()
            self.journal.append(own[0].value, own[1])
            self.catch_up()
        self.fate()
        self.replies.publish()
        return own is not None

    def checkpoint(self) -> None:
        """Write the fold down."""
        assert self.replies.all_written
        write_checkpoint(self.folder, self.fold, self.journal.run)

    def bundle(self, tier: str, *, final: bool = False) -> tuple[int, bytes]:
        """Version and weights for a tier."""
        version = self.journal.version_base + self.fold.offset
        made = self.method.bundles(self.journal.run, version, self.config.weights_codec, final=final)
        return version, made[tier]

    def again(self) -> SplitTrainer:
        """The next life."""
        self.close()
        return SplitTrainer(self.config, self.fate)

    def close(self) -> None:
        self.journal.close()


@dataclass
class _Adopted:
    """What an adopter is asked for."""

    in_use: InUse | None = None


@dataclass
class SplitDevice:
    """A device over all its lives."""

    folder: Path
    plan: Plan
    name: str
    tier: str
    data: Path
    fate: Fate = field(default_factory=Fate)
    adopted: _Adopted = field(default_factory=_Adopted)
    done: bool = False
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.replies: SimpleQueue[GradientReply] = SimpleQueue()
        self.begin()

    def begin(self) -> None:
        """A life begins."""
        tier = self.plan.tiers[self.tier]
        method = self.plan.method
        assert isinstance(method, SplitLora)
        self.outbox = Outbox(self.folder, job=JOB, device=self.name, tier=self.tier, max_bytes=2**26)
        self.outbox.begin_run(self.plan.run)
        context = AgentContext(
            config=AgentConfig(job=JOB, data=DataConfig(path=str(self.data), held_out_share=0.0)),
            instance="",
            client_id="",
            outbox=self.outbox,
            evaluation_rows=(),
            stream=None,
            connect=lambda *_: InProcessBroker().transport(""),
            load_backbone=lambda *_: shared_backbone(""),
            metrics=AgentMetrics(CollectorRegistry()),
            stop=cast(Any, None),
            trace=_FatefulTrace(self.fate),
            trust=cast(Trust, None),
            clock=lambda: self.clock(),
        )
        backbone = shared_backbone(tier.backbone, tier.layers)
        lower = lower_half(backbone, method.lora)
        patience = Patience("waits", lambda: False, SideTasks())
        preparer, writer = Preparer(backbone, self.plan, self.tier), Writer(self.plan, self.tier)
        batches = StoredBatches(self.outbox, method.passes)
        self.source = open_source(context.config.data, self.folder)
        intake = BatchIntake(
            *(self.source, self.outbox, preparer, writer, batches),
            batch_size=tier.batch_size,
            max_message_bytes=2**18,
            held_out_share=0.0,
            patience=patience,
        )
        departures = Departures(
            *(context, batches, writer),
            reuse_below=method.reuse_below,
            patience=patience,
            on_batch=self.fate,
        )
        adopter = cast(Adopter, self.adopted)
        adapters: DeviceAdapters = HeldAdapters(
            *(lower, adopter, writer, self.outbox),
            in_step=method.window == 1,
            clock=context.clock,
        )
        if method.adapters == "local":
            steps = local_steps(lower, method.round)
            adapters = OwnAdapters(
                *(lower, adopter, writer, steps, method.round, self.outbox),
                patience=patience,
                on_batch=self.fate,
            )
        self.batches, self.lower, self.adapters = batches, lower, adapters
        self.exchange = Exchange(
            *(context, method.window, intake, batches, departures, writer, adapters),
            replies=self.replies,
            pad=preparer.pad,
            patience=patience,
            on_batch=self.fate,
        )

    def step(self) -> bool:
        """Whatever can be done now; return whether there was anything."""
        if self.exchange._step():
            return True
        self.done = self.exchange._is_done()
        return False

    def waiting(self) -> list[bytes]:
        """What the outbox has for the trainer."""
        return [one.payload for one in self.outbox.streams.waiting(0, 64)]

    def receipted(self, receipt: Receipt) -> None:
        self.outbox.streams.receipt(receipt)

    def hear(self, reply: bytes) -> None:
        self.replies.put(unpack(GradientReply, reply))

    def adopt(self, version: int, bundle: bytes) -> None:
        self.adopted.in_use = InUse(self.plan.run, version, "", decode_adapters(bundle), None)

    def again(self) -> None:
        """Killed, and begun anew: what was only in memory is gone."""
        self.close()
        self.replies = SimpleQueue()
        self.begin()

    def close(self) -> None:
        self.source.close()
        self.outbox.close()


class SplitFleet:
    """Trainer and devices, and the wires between.

    Args:
        trainer: The trainer.
        devices: The devices.
        lots: Loses messages and says them twice; None for a perfect network.
    """

    def __init__(
        self, trainer: SplitTrainer, devices: Sequence[SplitDevice], lots: random.Random | None = None
    ) -> None:
        self.trainer = trainer
        self.devices = list(devices)
        self.lots = lots

    def run(self, *, now: Callable[[], float] = lambda: 0.0, most: int = 4000) -> None:
        """Let everybody take turns until nothing is left to do."""
        for _ in range(most):
            busy = [self._device_turn(device) for device in self.devices]
            served = self._trainer_turn(now())
            if not (any(busy) or served) and all(device.done for device in self.devices):
                return
        raise AssertionError("the fleet does not come to an end")

    def _device_turn(self, device: SplitDevice) -> bool:
        try:
            busy = device.step()
        except Killed:
            device.again()
            self._deliver_retained(device)
            return True
        for payload in device.waiting():
            busy = self._send(device, payload) or busy
        return busy

    def _send(self, device: SplitDevice, payload: bytes) -> bool:
        for _ in range(self._times()):
            try:
                receipt = self.trainer.take(device.name, device.tier, payload)
            except Killed:
                self.restart_trainer()
                return True
            if receipt is not None and self._times():
                device.receipted(receipt)
        return True

    def _trainer_turn(self, now: float) -> bool:
        try:
            served = self.trainer.serve(now)
        except Killed:
            self.restart_trainer()
            return True
        if self.lots is not None and self.lots.random() < 0.1:
            self.trainer.checkpoint()
        sent, self.trainer.link.sent = self.trainer.link.sent, []
        for device in self.devices:
            device.adopt(*self.trainer.bundle(device.tier))
            prefix = TOPICS.gradients_filter(device.tier, device.name)[:-1]
            for topic, payload in sent:
                if topic.startswith(prefix) and payload:
                    for _ in range(self._times()):
                        device.hear(payload)
        if self.lots is not None:  # a connection breaks, and comes back
            self._deliver_retained(self.lots.choice(self.devices))
        return served

    def restart_trainer(self) -> None:
        """The next life of the trainer; the broker may have forgotten what was retained."""
        self.trainer = self.trainer.again()

    def _deliver_retained(self, device: SplitDevice) -> None:
        prefix = TOPICS.gradients_filter(device.tier, device.name)[:-1]
        for topic, payload in self.trainer.link.retained.items():
            if topic.startswith(prefix):
                device.hear(payload)

    def _times(self) -> int:
        """How often a message arrives."""
        return 1 if self.lots is None else self.lots.choice((0, 1, 1, 1, 2))


@contextmanager
def fleet(
    folder: Path,
    settings: TrainerConfig,
    rows: dict[str, int],
    *,
    seed: int = 0,
    lots: random.Random | None = None,
    chance: float = 0.0,
) -> Iterator[SplitFleet]:
    """A trainer and, by tier, a device with so many rows."""
    fate = Fate(lots, chance)
    trainer = SplitTrainer(settings, Fate(lots, 0.0))
    trainer.catch_up()
    devices = []
    for number, (tier, count) in enumerate(rows.items()):
        name = tier.partition("/")[0]
        data = write_rows(folder / f"rows{number}.jsonl", count, f"{seed} {number}")
        place = folder / f"device{number}"
        devices.append(SplitDevice(place, trainer.plan, f"d{number}", name, data, fate=fate))
    for device in devices:
        device.adopt(*trainer.bundle(device.tier))
    trainer.fate.chance = chance
    made = SplitFleet(trainer, devices, lots)
    try:
        yield made
    finally:
        made.trainer.close()
        for device in devices:
            device.close()


def replaced(config: TrainerConfig, **changes: Any) -> TrainerConfig:
    return msgspec.structs.replace(config, **changes)
