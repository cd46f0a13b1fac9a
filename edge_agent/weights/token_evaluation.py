"""How well a language model's held-out tokens are predicted: computed once, kept in half precision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from edge_agent.batches.targets import Unusable
from edge_agent.batches.token_maker import TokenMaker
from edge_agent.samples.sample import Row
from edge_agent.weights.evaluation import EvaluationSet, Score
from sidestream.backbone.sampled import Ints
from sidestream.backbone.windows import Window
from sidestream.contract.quality import Tally, tally_tokens
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec, Tensor, decode, encode
from sidestream.side_network.inference import InferenceNetwork

log = logging.getLogger(__name__)
_AT_ONCE = 8  # windows that go through the backbone together


class _TokenBatch(NamedTuple):
    taps: Tensor
    """[B, M, d]."""
    targets: Ints
    """[M]."""


class TokenEvaluation(EvaluationSet):
    """The device's evaluation tokens.

    Args:
        maker: Computes activations as for uploading.
        rows: The samples; may return more each time, the known ones first.
        most_tokens: Of the first so many tokens that are to be predicted.
        stopped: Asked between batches; true abandons the work.
    """

    def __init__(
        self,
        maker: TokenMaker,
        rows: Callable[[], Sequence[Row]],
        most_tokens: int,
        *,
        stopped: Callable[[], bool],
    ) -> None:
        super().__init__(maker, Task.CAUSAL_LM, rows, stopped=stopped)
        self._tokens_of = maker
        self._left = most_tokens
        self._samples = 0
        self._windows: Sequence[Window] = ()  # of the sample before the next one, not computed yet
        self._kept: list[_TokenBatch] = []

    def measure(self, network: InferenceNetwork, align: str) -> Score | None:
        while not self._stopped() and self.extend():
            pass
        tally = Tally()
        for chunk in self._kept:
            if self._stopped():
                return None
            states = network.refine(align, decode(chunk.taps))
            tally += tally_tokens(*self._tokens_of.model.judge(states, chunk.targets))
        return None if self._stopped() else Score(tally, tally.measures(Task.CAUSAL_LM), self._samples)

    def extend(self) -> bool:
        if not self._windows:
            self._windows = self._next_windows()
        if not self._windows:
            return False
        self._keep(self._windows[:_AT_ONCE])
        self._windows = self._windows[_AT_ONCE:]
        return True

    def _next_windows(self) -> Sequence[Window]:
        """Those of the next sample that has any; none where enough is computed, or no sample is new."""
        rows = self._rows()
        while self._left > 0 and self._known < len(rows):
            row = rows[self._known]
            self._known += 1
            try:
                windows = self._tokens_of.windows(row)
            except Unusable as exc:
                log.warning("an evaluation sample is left out: %s", exc)
                continue
            self._samples += 1
            if windows:
                return windows
        return ()

    def _keep(self, windows: Sequence[Window]) -> None:
        if self._left <= 0:
            return
        sampled = self._tokens_of.every(windows)
        assert sampled.targets is not None
        taps, targets = sampled.vectors[:, : self._left], sampled.targets[: self._left]
        self._left -= len(targets)
        if np.isfinite(taps).all():
            self._kept.append(_TokenBatch(encode(taps, Codec.F16), targets))
