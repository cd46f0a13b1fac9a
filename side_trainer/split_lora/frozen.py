"""Devices whose layers stay as they are (SplitFrozen, arXiv 2503.18986): batches are learnt from, replayed.

One update for each batch as it is folded, then updates on the batches of shuffled passes over the journal
while nothing arrives. Nothing is answered, and devices hold no adapters: what they compute never changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import FACTS, IdleRecord, RecordKind, TierRecord
from side_trainer.method import Facts, Step, foreign
from side_trainer.split_lora.served_batch import told_vectors
from side_trainer.split_lora.split import SplitMethod
from side_trainer.split_lora.waiting_batches import WaitingBatches
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.tasks import PER_VECTOR
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import unpack

_SLICE: Final = 16  # batches an idle record
_IDLE_STREAM: Final = 2


class SplitFrozenMethod(SplitMethod):
    """See the module.

    Args:
        facts: What is fixed.
        journal: Where batches are read from.
        cache_bytes: Memory for batches that are decoded.
    """

    def __init__(self, facts: Facts, journal: Journal, cache_bytes: int) -> None:
        super().__init__(facts, journal, cache_bytes)
        self._batches = WaitingBatches(journal, cache_bytes)
        self._kept: list[tuple[int, str, str]] = []  # record, tier and stream of every batch
        self._last_idle: IdleRecord | None = None
        self._replayed = 0

    def _batch(self, record: Record) -> Step:
        self._note(record, self._batches.arrived(record))
        return self._learn_from([len(self._kept) - 1], 1.0, fresh=True)

    def _idle(self, record: Record) -> Step:
        idle = msgspec.json.decode(record.payload, type=IdleRecord)
        total = sum(1 for offset, _, _ in self._kept if offset <= idle.phase)
        places = np.arange(idle.position, idle.position + idle.rows)
        order = {
            number: self._shuffled(idle.phase, number, total) for number in set((places // total).tolist())
        }
        steps = [
            self._learn_from(
                [int(order[place // total][place % total])], self.falling((place + 1) / idle.total)
            )
            for place in places.tolist()
        ]
        self._remember(idle)
        tiers = sorted({tier for step in steps for tier in step.learnt})
        learnt = {
            tier: float(np.mean([step.learnt[tier] for step in steps if tier in step.learnt]))
            for tier in tiers
        }
        return Step(updates=len(steps), learnt=learnt, gradient_norm=steps[-1].gradient_norm)

    def _repeat(self, record: Record) -> Step:
        """What is here has come once more; nobody waits for an answer."""
        return Step()

    handlers: ClassVar = {
        **dict.fromkeys(set(RecordKind) - FACTS, foreign),
        RecordKind.BATCH: _batch,
        RecordKind.IDLE: _idle,
        RecordKind.REPEAT: _repeat,
    }

    @property
    def unlearnt(self) -> int:
        return 0

    def owed(self, passes: float) -> int:
        """Each new batch brings ``passes`` new ones."""
        return int(passes * len(self._kept)) - self._replayed

    def next_idle(self, passes: float, pass_rows: int, offset: int) -> IdleRecord:
        """Go on with the phase, or start one if batches have come since."""
        last = self._last_idle
        newest = self._kept[-1][0]
        if last is not None and last.position + last.rows < last.total and newest <= last.phase:
            position = last.position + last.rows
            rows = min(_SLICE, last.total - position)
            return IdleRecord(phase=last.phase, position=position, rows=rows, total=last.total)
        total = self.owed(passes)
        return IdleRecord(phase=offset, position=0, rows=min(_SLICE, total), total=total)

    @property
    def has_weights(self) -> bool:
        """Devices have no use for a version that is not all there is: none before the passes are over."""
        return bool(self._kept) and self.owed(self.settings.passes) <= 0

    def moved_by(self, before: Mapping[str, Floats], now: Mapping[str, Floats]) -> float:
        """See :attr:`has_weights`."""
        return 0.0

    def recall(self, offset: int) -> None:
        for record in self.journal.each(offset, (RecordKind.BATCH.value,)):
            self._note(record, unpack(ActivationBatch, record.payload))
        for record in self.journal.each(offset, (RecordKind.IDLE.value,)):
            self._remember(msgspec.json.decode(record.payload, type=IdleRecord))

    def _note(self, record: Record, batch: ActivationBatch) -> None:
        assert record.tier is not None and record.stream is not None
        targets = batch.read_targets()
        told = targets[told_vectors(batch)] if batch.target_form in PER_VECTOR else targets
        self.count(record.stream, told, record.samples)
        self._kept.append((record.offset, record.tier, record.stream))

    def _remember(self, idle: IdleRecord) -> None:
        self._last_idle = idle
        self._replayed += idle.rows

    def _learn_from(self, places: list[int], rate: float, *, fresh: bool = False) -> Step:
        (place,) = places
        offset, tier, stream = self._kept[place]
        batch = self._batches.take(offset, offset)
        learnt = self.learn(self.cut_of(tier), [batch], [stream], rate)
        served = ((tier, stream, learnt.losses[0]),) if fresh else ()
        return Step(updates=1, learnt={tier: learnt.losses[0]}, served=served, gradient_norm=learnt.norm)

    def _shuffled(self, phase: int, number: int, total: int) -> npt.NDArray[np.int64]:
        generator = np.random.default_rng([self.settings.seed, _IDLE_STREAM, phase, number])
        return generator.permutation(total)

    def _before_export(self, tier: TierRecord) -> None:
        """Below the cut there are no adapters: what stands there was learnt for devices with fewer layers."""
        with torch.no_grad():
            for name, parameter in self.model.parameters.items():
                layer = self.model.layer_of(name)
                if layer is not None and layer < tier.depth:
                    parameter.zero_()

    def _of_tier(
        self, tier: TierRecord, weights: Mapping[str, Floats], *, whole: bool
    ) -> Mapping[str, Floats]:
        """Devices get what is above their cut, and nothing before all of it is learnt."""
        layers = {name: self.model.layer_of(name) for name in weights}
        return {name: weights[name] for name, layer in layers.items() if layer is None or layer >= tier.depth}
