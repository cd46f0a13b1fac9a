"""A side-network learnt from a journal of activations: what Fed MobiLLM and MobiLLM do with its records.

A batch record changes nothing by itself. A learn record, which the trainer appends as soon as all that came
is folded, makes one update on the rows of the batches that have waited longest, then ``replay`` updates on
rows drawn from those learnt from so far: a trainer that falls behind learns from more at once. An idle record
makes updates on the next slice of a shuffled pass over the journal. What a mini-batch teaches
is in :mod:`side_trainer.side_tuning.batch_loss`, what an update does in
:mod:`side_trainer.side_tuning.optimiser`.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import (
    FACTS,
    IdleRecord,
    LearnRecord,
    RecordKind,
    SnapshotRecord,
    TierRecord,
)
from side_trainer.method import Arrays, Export, Facts, Method, Step, foreign, unmoved
from side_trainer.rows.drawn_rows import RowFeatures, draw
from side_trainer.rows.training_order import TrainingOrder
from side_trainer.rows.training_rows import MiniBatch, RowStore, StoredBatch, gather
from side_trainer.settings.schema import LearnerSettings
from side_trainer.side_tuning.batch_loss import BatchLoss, answers_by, loss_by
from side_trainer.side_tuning.device_weights import DeviceWeights
from side_trainer.side_tuning.export import EXPORTERS, Learnt, bundles_of
from side_trainer.side_tuning.linear_starts import EARLY, doubled, set_starts
from side_trainer.side_tuning.losses import Losses, served_of
from side_trainer.side_tuning.objectives import OBJECTIVES, Counts, Objective
from side_trainer.side_tuning.optimiser import Optimiser, half_cosine
from side_trainer.side_tuning.output_heads import Heads
from sidestream.accelerator.torch_device import HERE, Placement
from sidestream.contract.errors import StateError
from sidestream.contract.tasks import TASKS, Scale, TargetForm, Targets
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import WeightsCodec
from sidestream.side_network.form import align_of, starts_among
from sidestream.side_network.narrowing import Narrow, Narrowing, narrowest
from sidestream.side_network.network import SideNetwork
from sidestream.side_network.output_head import OutputHead

_JUDGED_ROWS: Final = 128  # by which weights are held against earlier ones
_JUDGED_TEXTS: Final = 4  # of a language model's
_HELD_AGAINST: Final = 512  # rows by which weights are held against narrower ones


class Stream(enum.IntEnum):
    """What randomness is for, beside the seed and a record's offset."""

    LEARN = 1
    SURVEY = 3


class SideTuningMethod(Method):
    """The side-network's state, and how records change it.

    Args:
        facts: What is fixed.
        journal: Where replayed rows are read from.
        cache_bytes: Memory for decoded rows.
    """

    def __init__(self, facts: Facts, journal: Journal, cache_bytes: int) -> None:
        super().__init__(facts, journal, cache_bytes)
        self.network: SideNetwork | None = None
        self.average: SideNetwork | None = None
        """The running mean of the network over updates: what devices get (Polyak averaging)."""
        self.heads = Heads(journal.folder)
        """Backbones' output heads, those that the task goes by."""
        self.rows = RowStore(journal, cache_bytes=cache_bytes)
        self._features = RowFeatures(self.rows)
        self.order = TrainingOrder(self.rows)
        """Which of them are learnt from next."""
        self.devices = DeviceWeights(self._device_of)
        """What each device counts in learning."""
        self._optimiser: Optimiser | None = None
        self._counts: dict[str, Counts] = {}
        self._made_loss: BatchLoss | None = None  # until settings, tiers or counts change
        self._narrowing = Narrowing()

    # --- facts ---------------------------------------------------------------------------------------

    def settings_changed(self) -> None:
        self._made_loss = None
        if self._optimiser is not None:
            self._optimiser.configure(self._learner)
        if self.network is None and not TASKS[self.facts.settings.task].named:
            self.labels_fixed()

    def labels_fixed(self) -> None:
        """Make the network: it is known now how many labels there are."""
        settings = self.facts.settings
        self.network = SideNetwork(
            settings.side_network,
            labels=len(self.facts.labels),
            seed=settings.learner.seed,
            dropout=settings.learner.dropout,
            task=settings.task,
        )
        self._place.put(self.network)
        self.average = copy.deepcopy(self.network)
        self._optimiser = Optimiser(self.network, self.average, self._learner, self._place)
        for tier in self.facts.tiers.values():
            self.tier_settled(tier)

    def tier_settled(self, tier: TierRecord) -> None:
        self._made_loss = None
        self._counts[tier.tier] = self._objective.no_counts(len(self.facts.labels))
        if self.network is None or tier.align in self.network.align_names:
            return
        assert self.average is not None and self._optimiser is not None
        for network in (self.network, self.average):
            network.add_align(tier.align, tier.width)
            self._place.put(network)
        self._optimiser.extend()

    # --- records -------------------------------------------------------------------------------------

    def _batch(self, record: Record) -> Step:
        assert record.tier is not None and record.stream is not None
        self._count(record.tier, self.rows.read(record).targets)
        self.order.arrived(record.offset, record.samples)
        self.devices.add(record.stream, record.samples)
        return Step()

    def _learn(self, record: Record) -> Step:
        settings = self._learner
        chosen = self.order.learn(msgspec.json.decode(record.payload, type=LearnRecord))
        before, known = self.rows.rows_before(chosen[0][0]), self.rows.rows_before(chosen[-1][0] + 1)
        doubted = {}
        if doubled(before, known):
            doubted = self._survey(record.offset, starts=known < EARLY)
        generator, losses = self._generator(Stream.LEARN, record.offset), Losses()
        with self._seeded(record.offset):
            fresh = self._gather(
                (self.rows.batch(offset), row) for offset, rows in chosen for row in range(rows)
            )
            shown = losses.add(fresh, self._update(fresh))
            for _ in range(settings.replay):
                drawn = self._mini_batch(generator.integers(known, size=settings.replay_rows))
                losses.add(drawn, self._update(drawn))
        return Step(
            updates=1 + settings.replay,
            learnt=losses.by_tier,
            served=served_of(fresh, shown),
            doubted=doubted,
        )

    def _idle(self, record: Record) -> Step:
        settings = self._learner
        idle = msgspec.json.decode(record.payload, type=IdleRecord)
        doubted = {} if idle.position else self._survey(record.offset, starts=True)
        chosen = self.order.idle(idle, settings.seed)
        losses, starts = Losses(), range(0, len(chosen), settings.pass_rows)
        with self._seeded(record.offset):
            for start in starts:
                drawn = self._mini_batch(chosen[start : start + settings.pass_rows])
                rate = half_cosine((idle.position + start) / idle.total, settings.final_rate)
                losses.add(drawn, self._update(drawn, rate=rate))
        return Step(updates=len(starts), learnt=losses.by_tier, doubted=doubted)

    def _snapshot(self, record: Record) -> Step:
        snapshot = msgspec.json.decode(record.payload, type=SnapshotRecord)
        self.order.let_go(snapshot.before, record.offset, self._learner)
        self.devices.count(self.journal.samples_by_stream(record.offset, since=snapshot.before))
        return Step()

    def _step(self, record: Record) -> Step:
        raise StateError(
            f"record {record.offset} is a step of several cells, which can be folded together only: "
            "sidestream trainer verify --cells CONFIG"
        )

    handlers: ClassVar = {
        **dict.fromkeys(set(RecordKind) - FACTS, foreign),
        RecordKind.BATCH: _batch,
        RecordKind.LEARN: _learn,
        RecordKind.IDLE: _idle,
        RecordKind.SNAPSHOT: _snapshot,
        RecordKind.STEP: _step,
        RecordKind.ASSIGNMENT: unmoved,
    }
    lets_go: ClassVar = True

    # --- while nothing arrives -----------------------------------------------------------------------

    def owed(self, passes: float) -> int:
        return self.order.owed(passes, self._learner)

    def next_idle(self, passes: float, pass_rows: int, offset: int) -> IdleRecord:
        return self.order.next_idle(self.owed(passes), pass_rows, offset)

    def next_own(self, now: float) -> tuple[RecordKind, bytes] | None:
        """Learn from what waits."""
        most = 1 if TASKS[self.facts.settings.task].generates else self._learner.update_rows
        learn = self.order.next_learn(most)
        return None if learn is None else (RecordKind.LEARN, msgspec.json.encode(learn))

    @property
    def kept_since(self) -> int:
        return self.order.kept_since

    # --- learning ------------------------------------------------------------------------------------

    def _update(self, batch: MiniBatch, *, rate: float = 1.0) -> npt.NDArray[np.float32]:
        """One optimiser update; returns each row's loss before it."""
        assert self.network is not None and self._optimiser is not None
        self.updates += 1
        loss, shown = self._loss.of(self.network.train(), batch)
        self._optimiser.step(loss, updates=self.updates, rate=rate)
        return shown

    def _survey(self, offset: int, *, starts: bool) -> dict[str, float]:
        """Weigh the devices anew by all rows so far, and with ``starts`` fit the linear starts to them.

        Only where rows have a label each is there anything to weigh by but their number, or a start. Returns
        whom it found to count for less than half.
        """
        facts, settings, drawn = self.facts, self._learner, {}
        if TASKS[facts.settings.task].form is TargetForm.LABELS:
            generator = self._generator(Stream.SURVEY, offset)
            drawn = draw(self._features, facts.tiers, generator, self.devices.number_of)
        doubted = self.devices.weigh(drawn.values(), settings.device_share)
        if not starts or not settings.linear_start:
            return doubted
        assert self.average is not None
        set_starts(self.average, drawn, facts, self.devices.values, len(self.rows))
        self._place.put(self.average)
        return doubted

    @property
    def _place(self) -> Placement:
        """Where it is computed; output heads of language models stay on the processor, and all with them."""
        if TASKS[self.facts.settings.task].generates:
            return HERE
        return self.facts.placement or HERE

    def _device_of(self, stream: str) -> str:
        known = self.journal.stream(stream)
        assert known is not None
        return known.device

    def _count(self, tier: str, targets: Targets) -> None:
        self._counts[tier] += self._objective.count(targets, len(self.facts.labels))
        self._made_loss = None

    @property
    def _loss(self) -> BatchLoss:
        if self._made_loss is None:
            facts = self.facts
            counts = self._counts_of_all
            self._made_loss = BatchLoss(facts.settings, facts.tiers, counts, self._head_of, self._place)
        return self._made_loss

    @property
    def scale(self) -> Scale:
        """What answers are measured in, by the targets folded so far."""
        none = self._objective.no_counts(len(self.facts.labels))
        return self._objective.scale(sum(self._counts_of_all.values(), none))

    @property
    def _counts_of_all(self) -> dict[str, Counts]:
        """Statistics of the targets of all rows that teach, by tier."""
        return self._counts

    def _mini_batch(self, rows: npt.NDArray[np.int64]) -> MiniBatch:
        return self._gather((self.rows.batch(offset), row) for offset, row in self.rows.locate(rows))

    def _gather(self, picks: Iterable[tuple[StoredBatch, int]]) -> MiniBatch:
        return gather(picks, self._align_of, self.devices.of).sent(self._place)

    def _align_of(self, tier: str) -> str:
        return self.facts.tiers[tier].align

    def _head_of(self, align: str) -> OutputHead:
        return self.heads.get(next(tier.head for tier in self.facts.tiers.values() if tier.align == align))

    @property
    def _objective(self) -> Objective:
        return OBJECTIVES[self.facts.settings.task]

    @property
    def _learner(self) -> LearnerSettings:
        return self.facts.settings.learner

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._learner.seed, *purpose])

    @contextmanager
    def _seeded(self, offset: int) -> Iterator[None]:
        """Torch's randomness (dropout) within a record."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self._generator(0, offset).integers(2**62)))
            yield

    # --- what others see -----------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        return self.order.dropped + len(self.rows)

    @property
    def unlearnt(self) -> int:
        return len(self.order.waiting)

    @property
    def head_bytes(self) -> int:
        return self.heads.nbytes

    def gain(self, before: Mapping[str, Floats]) -> float | None:
        if self.network is None or not len(self.rows):
            return None
        batch = self._latest(_JUDGED_ROWS)
        families = {family.align for family in batch.families}
        if before and not families <= {align_of(name) for name in before}:
            return None
        now, then = (loss_by(one, self.facts, self._loss, batch) for one in (self.weights(), before))
        return 1 - now / then if then > 0 else None

    def bundles(
        self, run: str, version: int, codec: WeightsCodec, *, final: bool = False
    ) -> Mapping[str, bytes]:
        return bundles_of(
            self._learnt(run, version), codec, self._narrow(final=final) if codec == "packed" else None
        )

    def _narrow(self, *, final: bool) -> Narrow | None:
        """In how few directions the weights may travel.

        Where rows have a label each, that is: of other tasks it was not measured.
        """
        labelled = TASKS[self.facts.settings.task].form is TargetForm.LABELS
        if self.network is None or not labelled or not len(self.rows):
            return None
        return self._narrowing.of(self.updates, self._narrowest, final=final)

    def _narrowest(self, most: float) -> Narrow | None:
        """The way by which answers to the latest rows move by no more than so far."""
        latest = self._latest(_HELD_AGAINST)
        answers = partial(answers_by, facts=self.facts, place=self._place, batch=latest)
        return narrowest(self.weights(), self._learner.seed, answers, most)

    def _latest(self, rows: int) -> MiniBatch:
        """The latest rows; of a language model a few texts."""
        most = _JUDGED_TEXTS if TASKS[self.facts.settings.task].generates else rows
        return self._mini_batch(np.arange(max(0, len(self.rows) - most), len(self.rows)))

    formats: ClassVar = tuple(EXPORTERS)

    def export(self, form: str, run: str, version: int, tier: str) -> Export:
        return EXPORTERS[form](self._learnt(run, version), tier)

    def _learnt(self, run: str, version: int) -> Learnt:
        return Learnt(facts=self.facts, weights=self.weights(), scale=self.scale, run=run, version=version)

    # --- checkpoints ---------------------------------------------------------------------------------

    def weights(self) -> dict[str, Floats]:
        """The side-network's averaged parameters; empty before the labels are fixed."""
        return self.average.arrays() if self.average is not None else {}

    def _learnt_state(self) -> Arrays:
        """What of the state is the network's."""
        arrays: Arrays = {f"average/{name}": array for name, array in self.weights().items()}
        if self.network is not None and self._optimiser is not None:
            arrays |= {f"current/{name}": array for name, array in self.network.arrays().items()}
            arrays |= self._optimiser.arrays()
        return arrays

    def state(self) -> Arrays:
        arrays = self._learnt_state()
        if len(self.devices.values):
            arrays["devices/weights"] = self.devices.values
        arrays |= {f"counts/{tier}": counts for tier, counts in self._counts.items()}
        return arrays | {"order": np.array([self.kept_since, *self.order.counters()])}

    def restore(self, offset: int, updates: int, arrays: Arrays) -> None:
        if "order" in arrays:
            since, counters = int(arrays["order"][0]), arrays["order"][1:]
            self.order.restore(counters, since, self.journal.batches(offset, since=since))
            self.devices.count(self.journal.samples_by_stream(offset, since=since))
        self._counts |= _below("counts", arrays)
        self._made_loss = None
        self.devices.values = arrays.get("devices/weights", self.devices.values)
        self._restore_learnt(updates, arrays)

    def _restore_learnt(self, updates: int, arrays: Arrays) -> None:
        """What of a :meth:`state` is the network's."""
        if self.network is not None and self.average is not None and self._optimiser is not None:
            self.network.load_arrays(_below("current", arrays))
            average = _below("average", arrays)
            for align, counts in starts_among(average).items():
                for taps in counts:
                    self.average.add_start(align, taps)
            self._place.put(self.average)
            self.average.load_arrays(average)
            self._optimiser.restore(arrays)
        self.updates = updates


def _below(key: str, arrays: Arrays) -> Arrays:
    prefix = f"{key}/"
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
