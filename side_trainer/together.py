"""How a cell's learner keeps step with those of the other cells.

Before each step all say where they stand, and each journals the step that follows from that. So a step is in
every cell's journal before any update of it is made, and whoever dies in between finds it there, or gets it
from the others. A rank that comes back takes the weights of one that has come furthest, and what it had not
learnt itself it only counts: all have the same weights again, and nothing is learnt twice.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from safetensors.numpy import load, save

from side_trainer.cells.group import CellLost
from side_trainer.cells.steps import CellReport, decide, lacking, last_step, step_of, unlike
from side_trainer.fold.fold import Fold
from side_trainer.job import recalled
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import RecordKind, SettingsRecord, StepPart, StepRecord, TierRecord
from side_trainer.side_tuning.in_cells import SideTuningInCells
from sidestream.contract.errors import StateError
from sidestream.contract.wire import prepared
from sidestream.side_network.bundle import state_digest

if TYPE_CHECKING:
    from side_trainer.cells.torch_group import TorchGroup
    from side_trainer.settings.schema import LearnerSettings

_log = logging.getLogger(__name__)
_TELL_EVERY_S: Final = 15.0


@prepared
class _Where(msgspec.Struct, frozen=True, kw_only=True):
    """What a cell tells the others when they have just met."""

    report: CellReport
    """Its step is the last in its journal."""
    last: StepRecord | None
    """That step,"""
    applied: Annotated[int, msgspec.Meta(ge=0)]
    """and the last that is in its weights."""


class Together:
    """One cell's side.

    Args:
        group: The trainers of all cells.
        names: What the cells are called, by rank.
        journal: This cell's.
        fold: What it comes to.
        offer: Given tiers that are settled elsewhere and not here, to be settled here as well.
    """

    def __init__(
        self,
        group: TorchGroup,
        names: Sequence[str],
        journal: Journal,
        fold: Fold,
        offer: Callable[[Mapping[str, TierRecord]], None] = lambda tiers: None,
    ) -> None:
        self._group = group
        self._names = names
        self._journal = journal
        self._fold = fold
        self._offer = offer
        self._told_s = -_TELL_EVERY_S
        self._was_there = False

    @property
    def there(self) -> bool:
        """Whether all cells take part."""
        return self._group.formed

    @property
    def _method(self) -> SideTuningInCells:
        assert isinstance(self._fold.method, SideTuningInCells)
        return self._fold.method

    def meet(self) -> bool:
        """Be with the others, or look for them for a moment; return whether all are there and level."""
        if self._group.formed:
            return True
        if not self._fold.begun:
            return False
        if self._was_there:
            self._was_there = False
            _log.warning("a cell is gone: this one goes on receipting, and learns again once all are there")
        if not self._group.form():
            self._tell("waiting for the trainers of all %d cells (this is %s)", len(self._names), self._name)
            return False
        step = self._method.step
        try:
            self._was_there = self._level()
        except CellLost as exc:
            _log.debug("met, and lost again: %s", exc)
        except StateError as exc:
            if self._method.step != step:  # without the weights of the step that it counts
                raise
            self._tell("the cells cannot learn together: %s", exc)
        if not self._was_there:
            self._group.leave()
        return self._was_there

    @property
    def _name(self) -> str:
        return self._names[self._group.rank]

    def leave(self) -> None:
        """Have the others wait for this one."""
        self._group.leave()

    def next_step(self, settings: LearnerSettings, *, quiet: bool) -> bool:
        """Journal the step that follows from where all stand; return whether there is one.

        All records of this cell have been folded.

        Args:
            settings: How many passes are made, of how many rows an update.
            quiet: Whether nothing has come for a while.

        Raises:
            CellLost: not all are there any more.
            StateError: the journal cannot be written.
        """
        method, owed = self._method, self._method.owed_here(settings.passes)
        facts = self._fold.facts
        own = CellReport(
            settings=_digest(facts.settings),
            tiers=tuple(facts.tiers[name] for name in sorted(facts.tiers)),
            step=method.step,
            through=method.next_learn(),
            quiet=quiet,
            owed=owed,
            idle=method.next_idle(settings.passes, settings.pass_rows * self._group.size, self._fold.offset)
            if owed > 0
            else None,
        )
        reports = self._exchange(own)
        if not self._agree(own, reports):
            return False
        others = [one for rank, one in enumerate(reports) if rank != self._group.rank]
        method.owed_elsewhere = sum(max(one.owed, int(one.through > 0)) for one in others)
        step = decide(reports)
        if step is not None:
            self._write(step)
        return step is not None

    def _exchange(self, own: CellReport) -> list[CellReport]:
        found = [
            msgspec.json.decode(data, type=CellReport)
            for data in self._group.gather("report", msgspec.json.encode(own))
        ]
        if len({one.step for one in found}) > 1:
            self._group.leave()
            raise CellLost("the cells are not at the same step")
        return found

    def _agree(self, own: CellReport, reports: Sequence[CellReport]) -> bool:
        """Whether settings and tiers are the same everywhere; tiers that lack here are settled meanwhile."""
        if why := unlike(reports):
            self._tell("the cells cannot learn together: %s", why)
            return False
        if more := lacking(own, reports):
            self._offer(more)
        return not any(lacking(one, reports) for one in reports)

    def _write(self, step: StepRecord) -> None:
        try:
            self._journal.append(RecordKind.STEP.value, msgspec.json.encode(step))
        except StateError:
            self._group.leave()  # the others have it, and this one will get it from them
            raise

    # --- after an absence ----------------------------------------------------------------------------

    def _level(self) -> bool:
        """Bring all cells to the same step and the same weights; return whether they are."""
        last = last_step(self._journal)
        own = _Where(
            report=_report(self._journal, 0 if last is None else last.number),
            last=last,
            applied=self._method.step,
        )
        told = self._group.gather("where", msgspec.json.encode(own))
        found = [msgspec.json.decode(data, type=_Where) for data in told]
        if not self._agree(own.report, [one.report for one in found]):
            return False
        steps = [one.last for one in found if one.last is not None]
        newest = max(steps, key=attrgetter("number"), default=None)
        furthest = max(one.applied for one in found)
        if newest is not None:
            self._check_whole(found, newest.number, furthest)
            if own.report.step < newest.number:
                self._write(_taken_over(newest, own.report.step, self._group.rank))
        self._take_over(furthest, next(at for at, one in enumerate(found) if one.applied == furthest))
        _log.info("all %d cells are there, at step %d", len(found), furthest)
        return True

    def _check_whole(self, found: Sequence[_Where], newest: int, furthest: int) -> None:
        """A cell whose journal was set back can do without steps that are in another one's weights."""
        for name, one in zip(self._names, found, strict=True):
            if max(one.report.step, furthest) < newest - 1:
                raise StateError(
                    f"the journal of cell {name} lacks steps {furthest + 1} to {newest - 1}, and no cell has "
                    "their weights: restore the state directories of all cells from backups of one time"
                )

    def _take_over(self, furthest: int, source: int) -> None:
        """Have the weights of the rank that has come furthest, and count what they were learnt from.

        They are here before anything is counted: a rank that is lost meanwhile leaves all as it was.
        """
        method = self._method
        shared = method.shared()
        digest = f"{method.step} {state_digest(shared)}".encode()
        digests = self._group.gather("digest", digest)
        if len(set(digests)) == 1:
            return
        own = save(shared) if self._group.rank == source else b""
        data = self._group.gather("weights", own)[source]
        if digest == digests[source]:
            return
        method.follows = furthest
        while method.step < furthest:
            [record] = self._journal.read(self._fold.offset, limit=1)
            if record.kind == RecordKind.STEP.value and step_of(record).number > furthest:
                break
            self._fold.apply(record)
        method.adopt(load(data))

    def _tell(self, text: str, *values: object) -> None:
        if time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self._told_s = time.monotonic()
            _log.warning(text, *values)


def _taken_over(newest: StepRecord, step: int, rank: int) -> StepRecord:
    """The step that lacks here; where more than that do, it has nothing of this cell's."""
    if step == newest.number - 1:
        return newest
    _log.warning(
        "this cell's journal was set back from step %d to %d: the weights stay as the others have them, and "
        "what its devices send again is learnt again",
        *(newest.number, step),
    )
    parts = tuple(StepPart() if at == rank else part for at, part in enumerate(newest.parts))
    return msgspec.structs.replace(newest, after=step, parts=parts)


def _digest(settings: SettingsRecord) -> str:
    return hashlib.sha256(msgspec.json.encode(settings)).hexdigest()


def _report(journal: Journal, step: int) -> CellReport:
    """By what is journaled, be it folded or not."""
    settings, _, tiers = recalled(journal)
    assert settings is not None, "the fold has begun with them"
    return CellReport(
        settings=_digest(settings), tiers=tuple(tiers[name] for name in sorted(tiers)), step=step
    )
