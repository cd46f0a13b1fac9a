"""The fold: weights as a pure function of the journal.

:meth:`Fold.apply` takes one record after another. Whatever it draws at random derives from the seed and the
record's offset, so the same records give the same bits, in this process or another, from the start or from a
checkpoint. It knows nothing of brokers, clocks or publishing.

Per batch record: one optimiser update on its rows, then ``replay`` updates on rows drawn from the journal so
far. Per idle record: updates on the next slice of a shuffled pass over the journal. What a mini-batch teaches
is in :mod:`side_trainer.fold.batch_loss`, what an update does in
:mod:`side_trainer.fold.optimiser`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from side_trainer.fold.batch_loss import BatchLoss
from side_trainer.fold.objectives import OBJECTIVES, Counts, Objective
from side_trainer.fold.optimiser import Optimiser
from side_trainer.fold.output_heads import Heads
from side_trainer.fold.training_rows import MiniBatch, RowStore, StoredBatch, gather
from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import IdleRecord, LabelsRecord, SettingsRecord, TierRecord
from side_trainer.settings.schema import LearnerSettings
from sidestream.contract.errors import StateError, WireError
from sidestream.contract.tasks import TASKS, Scale
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import prepared
from sidestream.side_network.bundle import state_digest
from sidestream.side_network.network import SideNetwork
from sidestream.side_network.output_head import OutputHead

_BATCH_STREAM: Final = 1
_IDLE_STREAM: Final = 2


@prepared
class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What applying a record did."""

    updates: int = 0
    """Optimiser updates."""
    losses: dict[str, float] = {}
    """By tier, mean loss of the first update's rows, before it."""


class Fold:
    """The learner's state, and how records change it.

    Args:
        journal: Where replayed rows are read from.
        cache_bytes: Memory for decoded rows.
    """

    def __init__(self, journal: Journal, *, cache_bytes: int = 256 * 2**20) -> None:
        self.offset = 0
        """The last record applied."""
        self.updates = 0
        """Optimiser updates so far."""
        self.idle_rows = 0
        """Rows that idle records trained on."""
        self.last_idle: IdleRecord | None = None
        self.settings: SettingsRecord | None = None
        self.labels: tuple[str, ...] = ()
        self.tiers: dict[str, TierRecord] = {}
        self.network: SideNetwork | None = None
        self.average: SideNetwork | None = None
        """The running mean of the network over updates: what devices get (Polyak averaging)."""
        self.heads = Heads(journal.folder)
        """Backbones' output heads, those that the task goes by."""
        self.rows = RowStore(journal, cache_bytes=cache_bytes)
        self._journal = journal
        self._optimiser: Optimiser | None = None
        self._counts: dict[str, Counts] = {}
        self._order: tuple[tuple[int, int], npt.NDArray[np.int64]] | None = None

    # --- records -------------------------------------------------------------------------------------

    def apply(self, record: Record) -> Step:
        """Apply the record that follows the last one.

        Raises:
            StateError: if the record is not what the trainer wrote: the journal is damaged.
        """
        if record.offset != self.offset + 1:
            raise StateError(f"the journal is damaged: record {self.offset + 1} is missing")
        try:
            step = self._apply(record)
        except (msgspec.MsgspecError, WireError, AssertionError, KeyError, IndexError) as exc:
            raise StateError(f"the journal is damaged: record {record.offset} cannot be folded") from exc
        self.offset = record.offset
        return step

    def _apply(self, record: Record) -> Step:
        if record.kind == "batch":
            return self._apply_batch(record)
        if record.kind == "idle":
            return self._apply_idle(record)
        self._apply_fact(record)
        return Step()

    def _apply_fact(self, record: Record) -> None:
        if record.kind == "settings":
            self.settings = msgspec.json.decode(record.payload, type=SettingsRecord)
            if self._optimiser is not None:
                self._optimiser.configure(self._learner)
            if self.network is None and not TASKS[self.settings.task].named:
                self._make_network()
        elif record.kind == "labels":
            self.labels = msgspec.json.decode(record.payload, type=LabelsRecord).labels
            self._make_network()
        elif record.kind == "tier":
            tier = msgspec.json.decode(record.payload, type=TierRecord)
            self.tiers[tier.tier] = tier
            self._counts[tier.tier] = self._objective.no_counts(len(self.labels))
            self._add_align(tier)
        else:
            raise StateError(f"the journal holds a {record.kind!r} record, which this version cannot fold")

    def _make_network(self) -> None:
        """Once it is known how many labels there are."""
        assert self.settings is not None
        self.network = SideNetwork(
            self.settings.side_network,
            labels=len(self.labels),
            seed=self.settings.learner.seed,
            dropout=self.settings.learner.dropout,
            task=self.settings.task,
        )
        self.average = copy.deepcopy(self.network)
        for tier in self.tiers.values():
            self._add_align(tier)
        self._counts = {name: self._objective.no_counts(len(self.labels)) for name in self.tiers}
        self._optimiser = Optimiser(self.network, self.average, self._learner)

    def _apply_batch(self, record: Record) -> Step:
        assert record.tier is not None
        settings = self._learner
        stored = StoredBatch.read(record.tier, record.payload)
        self._counts[record.tier] += self._objective.count(stored.targets, len(self.labels))
        self.rows.add(record.offset, record.samples)
        generator = self._generator(_BATCH_STREAM, record.offset)
        with self._seeded(record.offset):
            fresh = gather([(stored, row) for row in range(record.samples)], self._align_of)
            losses = self._update(fresh)
            for _ in range(settings.replay):
                self._update(self._mini_batch(generator.integers(len(self.rows), size=settings.replay_rows)))
        return Step(updates=1 + settings.replay, losses=losses)

    def _apply_idle(self, record: Record) -> Step:
        settings = self._learner
        idle = msgspec.json.decode(record.payload, type=IdleRecord)
        total = self.rows.rows_before(idle.phase + 1)
        chosen = np.concatenate(
            [
                self._shuffled(idle.phase, position // total, total)[position % total :][: idle.rows]
                for position in _parts(idle.position, idle.rows, total)
            ]
        )[: idle.rows]
        starts = range(0, len(chosen), settings.pass_rows)
        losses: dict[str, float] = {}
        with self._seeded(record.offset):
            for start in starts:
                shown = self._update(
                    self._mini_batch(chosen[start : start + settings.pass_rows]),
                    rate=_half_cosine((idle.position + start) / idle.total, settings.final_rate),
                )
                losses = losses or shown
        self.idle_rows += idle.rows
        self.last_idle = idle
        return Step(updates=len(starts), losses=losses)

    # --- learning ------------------------------------------------------------------------------------

    def _update(self, batch: MiniBatch, *, rate: float = 1.0) -> dict[str, float]:
        """One optimiser update; returns each tier's mean loss before it."""
        assert self.network is not None and self._optimiser is not None
        self.updates += 1
        loss, shown = self._loss.of(self.network.train(), batch)
        self._optimiser.step(loss, updates=self.updates, rate=rate)
        return {
            tier: float(np.mean([value for value, of in zip(shown, batch.tiers, strict=True) if of == tier]))
            for tier in sorted(set(batch.tiers))
        }

    @property
    def _loss(self) -> BatchLoss:
        assert self.settings is not None
        return BatchLoss(self.settings, self.tiers, self._counts, self._head_of)

    @property
    def scale(self) -> Scale:
        """What answers are measured in, by the targets folded so far."""
        none = self._objective.no_counts(len(self.labels))
        return self._objective.scale(sum(self._counts.values(), none))

    def _mini_batch(self, rows: npt.NDArray[np.int64]) -> MiniBatch:
        picks = ((self.rows.batch(offset), row) for offset, row in self.rows.locate(rows))
        return gather(picks, self._align_of)

    def _align_of(self, tier: str) -> str:
        return self.tiers[tier].align

    def _head_of(self, align: str) -> OutputHead:
        return self.heads.get(next(tier.head for tier in self.tiers.values() if tier.align == align))

    @property
    def _objective(self) -> Objective:
        assert self.settings is not None
        return OBJECTIVES[self.settings.task]

    @property
    def _learner(self) -> LearnerSettings:
        assert self.settings is not None
        return self.settings.learner

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._learner.seed, *purpose])

    @contextmanager
    def _seeded(self, offset: int) -> Iterator[None]:
        """Torch's randomness (dropout) within a record."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self._generator(0, offset).integers(2**62)))
            yield

    def _shuffled(self, phase: int, number: int, total: int) -> npt.NDArray[np.int64]:
        """The order of a phase's pass ``number``; the last one is kept, slices come one after another."""
        if self._order is None or self._order[0] != (phase, number):
            self._order = ((phase, number), self._generator(_IDLE_STREAM, phase, number).permutation(total))
        return self._order[1]

    def _add_align(self, tier: TierRecord) -> None:
        if self.network is None or tier.align in self.network.align_names:
            return
        for network in (self.network, self.average):
            assert network is not None
            network.add_align(tier.align, tier.width)
        if self._optimiser is not None:
            self._optimiser.extend()

    # --- state ---------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Floats]:
        """The side-network's averaged parameters; empty before the labels are fixed."""
        return self.average.arrays() if self.average is not None else {}

    def digest(self) -> str:
        """sha256 of :meth:`weights`."""
        return state_digest(self.weights())

    def state(self) -> dict[str, Floats]:
        """All that the journal up to :attr:`offset` cannot give back without computing: for a checkpoint."""
        arrays = {f"average/{name}": array for name, array in self.weights().items()}
        if self.network is not None:
            arrays |= {f"current/{name}": array for name, array in self.network.arrays().items()}
        if self._optimiser is not None:
            arrays |= self._optimiser.arrays()
        return arrays

    def restore(self, offset: int, updates: int, arrays: dict[str, Floats]) -> None:
        """Return to a :meth:`state` taken at ``offset``; everything else is read from the journal.

        Raises:
            DecodeError: if the arrays do not fit the journal.
        """
        self.recall_facts(offset)
        for record in self._journal.others(offset, ("idle",)):
            self.last_idle = msgspec.json.decode(record.payload, type=IdleRecord)
            self.idle_rows += self.last_idle.rows
        for at, tier, samples in self._journal.batches(offset):
            self.rows.add(at, samples)
            targets = StoredBatch.read_targets(self._journal.get(at).payload)
            self._counts[tier] += self._objective.count(targets, len(self.labels))
        if self.network is not None and self.average is not None and self._optimiser is not None:
            self.network.load_arrays(_below("current", arrays))
            self.average.load_arrays(_below("average", arrays))
            self._optimiser.restore(arrays)
        self.offset, self.updates = offset, updates

    def recall_facts(self, offset: int) -> None:
        """Read settings, labels and tiers up to ``offset``, without their batches."""
        for record in self._journal.others(offset, ("settings", "labels", "tier")):
            self._apply_fact(record)


def _below(key: str, arrays: dict[str, Floats]) -> dict[str, Floats]:
    prefix = f"{key}/"
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


def _parts(position: int, rows: int, total: int) -> list[int]:
    """Where a slice starts, and where each further pass that it runs into does."""
    return [position, *range((position // total + 1) * total, position + rows, total)]


def _half_cosine(progress: float, final: float) -> float:
    """1 at progress 0, ``final`` at progress 1."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
