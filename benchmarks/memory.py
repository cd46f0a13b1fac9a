"""A device's peak memory for a row of the accuracy table, on the deepest tier's backbone."""

from __future__ import annotations

from typing import Final

import numpy as np

from benchmarks.probe import ProbeError, Request, measure
from benchmarks.program import Tell
from benchmarks.workload import Workload

_METHODS: Final = {"lora": "lora", "fedavg-lora": "lora", "full": "full"}
_BATCH: Final = 16
_BATCHES: Final = 4
_MAX_TOKENS: Final = 128


class Memory:
    """Measures each method once.

    Args:
        work: The data and the backbone.
        tell: Told why there is no figure, where there is none.
    """

    def __init__(self, work: Workload, tell: Tell) -> None:
        self._work = work
        self._tell = tell
        self._known: dict[str, int | None] = {}

    def peak_bytes(self, row: str) -> int | None:
        """Peak memory above the loaded model, over batches of the longest and of random samples."""
        method = _METHODS.get(row, "agent")
        if method not in self._known:
            self._known[method] = self._measure(method)
        return self._known[method]

    def _measure(self, method: str) -> int | None:
        work = self._work
        texts = sorted((example.text for example in work.train), key=len, reverse=True)
        order = np.random.default_rng(0).permutation(len(texts))[: _BATCH * _BATCHES]
        chosen = [texts[:_BATCH]] + [
            [texts[index] for index in order[start : start + _BATCH]]
            for start in range(0, len(order), _BATCH)
        ]
        request = Request(
            method=method,
            batches=chosen,
            max_tokens=_MAX_TOKENS,
            backbone=work.backbone,
            layers=work.tiers[work.deepest],
        )
        try:
            return measure(request).peak_bytes
        except ProbeError as exc:
            self._tell(str(exc))
            return None
