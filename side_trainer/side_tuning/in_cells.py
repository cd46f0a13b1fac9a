"""Side-tuning in several cells: each trainer has the rows of its own devices, all have the same weights.

Every update is made by all together: gradients are averaged over all ranks' rows, and what then moves the
weights is the same arithmetic everywhere. What else weights hang on, the label prior, what devices count and
linear starts, is made of what all ranks know. A step that another rank does not live to finish has not
happened: it is undone, and made again once that one is back.
"""

from __future__ import annotations

import math
from typing import ClassVar, Final

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from side_trainer.cells.gradients import average_gradients
from side_trainer.cells.group import CellLost
from side_trainer.cells.steps import step_of
from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import IdleRecord, LearnRecord, RecordKind, StepRecord
from side_trainer.method import Arrays, Facts, Step
from side_trainer.rows.drawn_rows import Drawn, draw
from side_trainer.rows.training_order import Batches
from side_trainer.rows.training_rows import MiniBatch
from side_trainer.side_tuning.device_weights import weighed
from side_trainer.side_tuning.linear_starts import EARLY, doubled, set_starts
from side_trainer.side_tuning.losses import Losses, served_of
from side_trainer.side_tuning.method import SideTuningMethod, Stream
from side_trainer.side_tuning.objectives import Counts
from side_trainer.side_tuning.optimiser import half_cosine
from sidestream.contract.errors import StateError
from sidestream.contract.tasks import TASKS, TargetForm
from sidestream.contract.tensors import Floats

_DEVICES: Final = "devices of"
_UPDATES: Final = "updates"
STEP_KEY: Final = "step"
"""Under which a checkpoint has the last step that it includes."""


class SideTuningInCells(SideTuningMethod):
    """One rank's side.

    Args:
        facts: What is fixed, and the group.
        journal: This cell's.
        cache_bytes: Memory for decoded rows.
    """

    def __init__(self, facts: Facts, journal: Journal, cache_bytes: int) -> None:
        super().__init__(facts, journal, cache_bytes)
        assert facts.group is not None
        self.group = facts.group
        self.step = 0
        """The last step that is folded in."""
        self.follows = 0
        """Up to this step, weights will come from another rank: what is learnt from is counted, no more."""
        self.owed_elsewhere = 1
        """Rows that other cells still have to learn from, when they last said so; some, until they have."""
        self._everyones: dict[str, Counts] = {}  # as of the last step, by tier
        self._weights_of: list[dict[str, float]] = [{}] * self.group.size
        """By rank, what each device counts, as the last survey found."""

    # --- steps ---------------------------------------------------------------------------------------

    def _step(self, record: Record) -> Step:
        step = step_of(record)
        if step.after != self.step or len(step.parts) != self.group.size:
            raise StateError(
                f"the journal is damaged: step {step.number}, of {len(step.parts)} cells, after {self.step}"
            )
        part, chosen = step.parts[self.group.rank], Batches()
        if part.through:
            chosen = self.order.chosen(LearnRecord(through=part.through))
        done = Step()
        if step.number > self.follows:
            before = self.shared()
            try:
                done = self._together(record.offset, step, chosen)
            except CellLost:
                self.adopt(before)
                raise
        if chosen:
            self.order.learnt(len(chosen))
        if part.idle is not None:
            self.order.trained(part.idle)
        self.step = step.number
        return done

    handlers: ClassVar = {**SideTuningMethod.handlers, RecordKind.STEP: _step}

    def _together(self, offset: int, step: StepRecord, chosen: Batches) -> Step:
        waiting = self.order.waiting
        known = self.rows.rows_before(waiting[0][0]) if waiting else len(self.rows)
        known_after = self.rows.rows_before(chosen[-1][0] + 1) if chosen else known
        before, after = self._meet(step.number, known, known_after)
        with self._seeded(offset):
            if step.learns:
                doubted = {}
                if doubled(before, after):
                    doubted = self._survey_together(step.number, offset, starts=after < EARLY)
                return self._learn_together(offset, chosen, known_after, doubted)
            begins = any(part.idle is not None and not part.idle.position for part in step.parts)
            doubted = self._survey_together(step.number, offset, starts=True) if begins else {}
            return self._idle_together(step, doubted)

    def _meet(self, number: int, known: int, known_after: int) -> tuple[int, int]:
        """Add up what all have: rows learnt from before and after this step; counts of targets on the way."""
        own: Arrays = {f"counts/{tier}": counts for tier, counts in self._counts.items()}
        own["known"] = np.array([known, known_after])
        found = [load(data) for data in self.group.gather(f"step {number}", save(own))]
        self._everyones = {tier: sum(one[f"counts/{tier}"] for one in found) for tier in self._counts}
        self._made_loss = None
        before, after = np.sum([one["known"] for one in found], axis=0).tolist()
        return before, after

    def _learn_together(self, offset: int, chosen: Batches, known: int, doubted: dict[str, float]) -> Step:
        settings, losses = self._learner, Losses()
        generator = self._generator(Stream.LEARN, offset)
        fresh = self._gather(
            (self.rows.batch(at), row) for at, rows in chosen for row in range(rows)
        ) if chosen else None  # fmt: skip
        shown = losses.add(fresh, self._update(fresh))
        for _ in range(settings.replay):
            drawn = None
            if known:
                drawn = self._mini_batch(generator.integers(known, size=settings.replay_rows))
            losses.add(drawn, self._update(drawn))
        return Step(
            updates=1 + settings.replay,
            learnt=losses.by_tier,
            served=() if fresh is None else served_of(fresh, shown),
            doubted=doubted,
        )

    def _idle_together(self, step: StepRecord, doubted: dict[str, float]) -> Step:
        settings, losses = self._learner, Losses()
        slices = [part.idle for part in step.parts if part.idle is not None]
        updates = math.ceil(sum(one.rows for one in slices) / (settings.pass_rows * self.group.size))
        own = step.parts[self.group.rank].idle
        rows = np.zeros(0, np.int64) if own is None else self.order.slice_of(own, settings.seed)
        for number, piece in enumerate(np.array_split(rows, updates)):
            drawn = self._mini_batch(piece) if len(piece) else None
            rate = half_cosine(_progress(slices, number / updates), settings.final_rate)
            losses.add(drawn, self._update(drawn, rate=rate))
        return Step(updates=updates, learnt=losses.by_tier, doubted=doubted)

    def _update(self, batch: MiniBatch | None, *, rate: float = 1.0) -> npt.NDArray[np.float32]:
        """One update of all ranks; returns the loss of this one's rows before it."""
        assert self.network is not None and self._optimiser is not None
        self.updates += 1
        loss, shown, rows = None, np.zeros(0, np.float32), 0
        if batch is not None:
            loss, shown = self._loss.of(self.network.train(), batch)
            rows = len(batch.targets)
            loss = loss * rows  # a sum, so that ranks' gradients can be added
        self._optimiser.step(
            loss,
            updates=self.updates,
            rate=rate,
            meet=lambda parameters: average_gradients(parameters, rows, self.group),
        )
        return shown

    @property
    def _counts_of_all(self) -> dict[str, Counts]:
        return {**self._counts, **self._everyones}

    # --- devices, and linear starts ------------------------------------------------------------------

    def _survey_together(self, number: int, offset: int, *, starts: bool) -> dict[str, float]:
        """As the survey of one trainer, of the rows of all."""
        facts, settings, own = self.facts, self._learner, {}
        if TASKS[facts.settings.task].form is TargetForm.LABELS and len(self.rows):
            generator = self._generator(Stream.SURVEY, offset)
            own = draw(self._features, facts.tiers, generator, self.devices.number_of, share=self.group.size)
        told = save(
            _packed(own)
            | {
                "devices": np.array(self.devices.rows, np.int64),
                "names": _written(self.devices.names),
                "rows": _one(len(self.rows)),
            }
        )
        found = [load(data) for data in self.group.gather(f"survey {number}", told)]
        devices = [len(one["devices"]) for one in found]
        ends = np.cumsum(devices, dtype=np.int64)
        drawn = _joined(found, ends - devices)
        all_rows = np.concatenate([one["devices"] for one in found]).tolist()
        trusts, values = weighed(drawn.values(), all_rows, settings.device_share)
        self._weights_of = [
            dict(zip(msgspec.json.decode(one["names"].tobytes()), some.tolist(), strict=True))
            for one, some in zip(found, np.split(values, ends[:-1]), strict=True)
        ]
        doubted = self.devices.take(np.split(trusts, ends[:-1])[self.group.rank], self._own_values())
        if not starts or not settings.linear_start or not drawn:
            return doubted
        assert self.average is not None
        set_starts(self.average, drawn, facts, values, int(sum(one["rows"][0] for one in found)))
        self._place.put(self.average)
        return doubted

    def _own_values(self) -> Floats:
        """[D]: what this cell's devices count; those that came since have not been weighed."""
        known = self._weights_of[self.group.rank]
        return np.array([known.get(name, 1.0) for name in self.devices.names], np.float32)

    def _told_of_devices(self) -> Arrays:
        return {f"{_DEVICES}/{rank}": _written(known) for rank, known in enumerate(self._weights_of)}

    # --- what is alike everywhere --------------------------------------------------------------------

    def owed(self, passes: float) -> int:
        return super().owed(passes) + self.owed_elsewhere

    def owed_here(self, passes: float) -> int:
        """As :meth:`owed`, of this cell alone."""
        return super().owed(passes)

    def next_idle(self, passes: float, pass_rows: int, offset: int) -> IdleRecord:
        return self.order.next_idle(self.owed_here(passes), pass_rows, offset)

    def next_own(self, now: float) -> None:
        return None

    def next_learn(self) -> int:
        """The record through which this cell would learn next; 0 if no batch waits."""
        learn = self.order.next_learn(self._learner.update_rows)
        return 0 if learn is None else learn.through

    def shared(self) -> Arrays:
        """What all ranks have alike; shares no memory with it."""
        return self._learnt_state() | self._told_of_devices() | {_UPDATES: _one(self.updates)}

    def adopt(self, arrays: Arrays) -> None:
        """Take what another rank has as its own, the records up to its step having been folded."""
        self._restore_learnt(int(arrays[_UPDATES][0]), arrays)
        self._weights_of = _of_devices(arrays, self.group.size)
        self.devices.values = self._own_values()

    def state(self) -> Arrays:
        return super().state() | self._told_of_devices() | {STEP_KEY: _one(self.step)}

    def restore(self, offset: int, updates: int, arrays: Arrays) -> None:
        super().restore(offset, updates, arrays)
        self.step = int(arrays[STEP_KEY][0]) if STEP_KEY in arrays else 0
        self._weights_of = _of_devices(arrays, self.group.size)


def _progress(slices: list[IdleRecord], within: float) -> float:
    """How much of all that passes have to train on is done, so far within a step."""
    done = sum(one.position + within * one.rows for one in slices)
    return done / sum(one.total for one in slices)


def _of_devices(arrays: Arrays, size: int) -> list[dict[str, float]]:
    keys = [f"{_DEVICES}/{rank}" for rank in range(size)]
    return [msgspec.json.decode(arrays[key].tobytes()) if key in arrays else {} for key in keys]


def _written(value: object) -> npt.NDArray[np.uint8]:
    return np.frombuffer(msgspec.json.encode(value), np.uint8)


def _packed(drawn: dict[str, Drawn]) -> Arrays:
    return {f"{align}/{name}": getattr(one, name) for align, one in drawn.items() for name in Drawn._fields}


def _joined(found: list[Arrays], first_device: npt.NDArray[np.int64]) -> dict[str, Drawn]:
    """By alignment map, all ranks' rows; devices are numbered rank by rank."""
    aligns = sorted({name.rpartition("/")[0] for one in found for name in one if name.endswith("/taps")})
    joined = {}
    for align in aligns:
        those = [
            (one, first) for one, first in zip(found, first_device, strict=True) if f"{align}/taps" in one
        ]
        most = max(one[f"{align}/features"].shape[1] for one, _ in those)
        joined[align] = Drawn(
            np.concatenate([_widened(one[f"{align}/features"], most) for one, _ in those]),
            np.concatenate([one[f"{align}/taps"] for one, _ in those]),
            np.concatenate([one[f"{align}/targets"] for one, _ in those]),
            np.concatenate([one[f"{align}/owners"] + first for one, first in those]),
        )
    return joined


def _widened(features: Floats, taps: int) -> Floats:
    return np.pad(features, ((0, 0), (0, taps - features.shape[1]), (0, 0)))


def _one(number: int) -> npt.NDArray[np.int64]:
    return np.array([number], np.int64)
