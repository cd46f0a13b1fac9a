"""Quality on a device's own samples, where it has room for the whole model; else it says so, once.

Only a version that is all there is to learn has what answers take: the adapters of every layer, and the head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from edge_agent.batches.targets import Unusable
from edge_agent.context import AgentContext
from edge_agent.samples.sample import Row
from edge_agent.split_lora.prepared import PreparedRow, Preparer
from edge_agent.split_lora.whole import has_room, load_tuned
from edge_agent.weights.evaluation import Score
from sidestream.backbone.text_input import Tokens, padded
from sidestream.contract.errors import BackboneError
from sidestream.contract.plan import Plan
from sidestream.contract.quality import Tally, tally_tokens
from sidestream.contract.tasks import TASKS
from sidestream.split_model.adapter_bundle import AdapterBundle
from sidestream.split_model.loading import Whole

_ROWS: Final = 32
_NOTHING: Final = Score(Tally(), {}, 0)
log = logging.getLogger(__name__)


class SplitEvaluation:
    """Belongs to the thread that computes.

    Args:
        context: The agent's.
        plan: The job.
        preparer: Makes rows.
        stopped: Asked between batches; true abandons the work.
    """

    def __init__(
        self, context: AgentContext, plan: Plan, preparer: Preparer, *, stopped: Callable[[], bool]
    ) -> None:
        self._context = context
        self._plan = plan
        self._preparer = preparer
        self._stopped = stopped
        self._told = False

    def extend(self) -> bool:
        """Nothing can be computed before there are adapters."""
        return False

    def measure(self, bundle: AdapterBundle, align: str) -> Score | None:
        """How well the whole model answers with a version; None if stopped meanwhile."""
        rows = self._rows()
        if not bundle.about.whole or not rows or not self._has_room():
            return _NOTHING
        config = self._context.config
        try:
            whole = load_tuned(
                config.backbone or self._plan.tiers[self._context.tier].backbone,
                bundle,
                self._plan.tiers[self._context.tier],
            )
        except BackboneError as exc:
            log.warning("the whole model cannot be used here, so nothing is measured: %s", exc)
            return _NOTHING
        if TASKS[self._plan.task].generates:
            return self._measure_tokens(whole, rows)
        return self._measure_answers(whole, rows, bundle)

    def _rows(self) -> Sequence[Row]:
        context = self._context
        if context.evaluation_rows is not None:
            return context.evaluation_rows
        return context.outbox.held_out(context.config.data.evaluation_max_samples)

    def _has_room(self) -> bool:
        tier = self._plan.tiers[self._context.tier]
        fits = has_room(tier, self._context.config.whole_model)
        if not fits and not self._told:
            log.info(
                "this device has no room for the whole model (%d MiB): it trains, and neither measures nor "
                'predicts; whole_model = "always" would have it try',
                tier.whole_bytes >> 20,
            )
        self._told = True
        return fits

    def _measure_answers(self, whole: Whole, rows: Sequence[Row], bundle: AdapterBundle) -> Score | None:
        targets, tally, samples = self._preparer.targets, Tally(), 0
        usable = sorted((row for row in rows if row.label and not row.is_blank), key=lambda row: row.size)
        for start in range(0, len(usable), _ROWS):
            if self._stopped():
                return None
            texts, wanted = [], []
            for row in usable[start : start + _ROWS]:
                try:
                    wanted.append(targets.read(str(row.label), row.text, judge=True))
                    texts.append(row)
                except Unusable as exc:
                    log.warning("an evaluation sample is left out: %s", exc)
            if texts:
                answers = whole.answers(self._tokens(texts))
                tally += targets.tally(answers, np.stack(wanted), bundle.about.scale)
                samples += len(texts)
        return Score(tally, tally.measures(self._plan.task), samples)

    def _tokens(self, rows: Sequence[Row]) -> Tokens:
        found = [PreparedRow(*self._preparer.tokenised(row), None) for row in rows]
        return self._preparer.body_tokens(found)

    def _measure_tokens(self, whole: Whole, rows: Sequence[Row]) -> Score | None:
        left, tally, samples = self._context.config.data.evaluation_max_tokens, Tally(), 0
        for row in rows:
            if self._stopped():
                return None
            try:
                windows = self._preparer.windows(row)
            except Unusable as exc:
                log.warning("an evaluation sample is left out: %s", exc)
                continue
            samples += 1
            for window in windows:
                ids, mask = padded([window.ids], self._preparer.pad)
                losses, hits = whole.judge(Tokens(ids, mask), np.asarray(window.target))
                tally += tally_tokens(losses[:left], hits[:left])
                left -= len(losses)
                if left <= 0:
                    return Score(tally, tally.measures(self._plan.task), samples)
        return Score(tally, tally.measures(self._plan.task), samples)
