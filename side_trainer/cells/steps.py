"""What cells do next: pure, and the same on every rank, from what all have said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec

from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import IdleRecord, RecordKind, StepPart, StepRecord, TierRecord
from sidestream.contract.wire import prepared


@prepared
class CellReport(msgspec.Struct, frozen=True, kw_only=True):
    """Where a cell is, before a step."""

    settings: str
    """Digest of what decides the weights."""
    tiers: tuple[TierRecord, ...]
    """Those that are settled."""
    step: Annotated[int, msgspec.Meta(ge=0)]
    """The last in its journal."""
    through: int = 0
    """The record of the last batch that it would learn from now; 0 if none waits."""
    quiet: bool = False
    """Whether nothing has come for a while."""
    owed: int = 0
    """Rows that its passes owe."""
    idle: IdleRecord | None = None
    """The slice that it would train on."""


def decide(reports: Sequence[CellReport]) -> StepRecord | None:
    """The next step; None if there is nothing to do.

    What came is learnt first, whoever has it. Passes are made once it is quiet everywhere; a slice is of all
    cells' rows, and each brings its share of those that are owed, so that all end together.
    """
    number = reports[0].step + 1
    if any(one.through for one in reports):
        parts = [StepPart(through=one.through) for one in reports]
    elif all(one.quiet for one in reports) and any(one.idle for one in reports):
        owed = sum(one.owed for one in reports if one.idle)
        rows = max(one.idle.rows for one in reports if one.idle)
        parts = [StepPart(idle=_paced(one, rows / owed)) for one in reports]
    else:
        return None
    return StepRecord(number=number, after=number - 1, parts=tuple(parts))


def _paced(report: CellReport, share: float) -> IdleRecord | None:
    """A slice of such a share of what is owed."""
    idle = report.idle
    if idle is None:
        return None
    return msgspec.structs.replace(idle, rows=min(idle.rows, max(1, math.ceil(report.owed * share))))


def unlike(reports: Sequence[CellReport]) -> str:
    """In words, what cells do not agree on; empty if they do."""
    if len({one.settings for one in reports}) > 1:
        return "their settings differ; give all cells the same file, and restart them"
    for name in sorted({tier.tier for one in reports for tier in one.tiers}):
        found = [tier for one in reports for tier in one.tiers if tier.tier == name]
        if any(tier != found[0] for tier in found):
            return f"tier {name} has another backbone in one cell than in another; its devices have to agree"
    return ""


def lacking(own: CellReport, reports: Sequence[CellReport]) -> dict[str, TierRecord]:
    """By name, the tiers that are settled elsewhere and not here."""
    known = {tier.tier for tier in own.tiers}
    return {tier.tier: tier for one in reports for tier in one.tiers if tier.tier not in known}


def step_of(record: Record) -> StepRecord:
    """A step, as it was journaled."""
    return msgspec.json.decode(record.payload, type=StepRecord)


def last_step(journal: Journal) -> StepRecord | None:
    """The last step of a cell's journal."""
    record = journal.last(RecordKind.STEP.value)
    return None if record is None else step_of(record)
