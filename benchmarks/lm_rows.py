"""The rows of the language-model table: each runs one method for one seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.fleet_run import Tell
from benchmarks.lm_data import LmWorkload
from benchmarks.lm_table import LmMeasured
from benchmarks.lm_tuned import BATCH, LmTuned, Tuner
from benchmarks.probe import ProbeError, Request, measure
from edge_agent.language_model import shared_language_model

_METHODS: Final = {"lora": "lm-lora", "full": "lm-full"}
_BATCHES: Final = 4


@dataclass(frozen=True, kw_only=True)
class LmOptions:
    """What the command line asks for, besides the data."""

    lora_epochs: float = 3.0
    """Of LoRA."""
    lora_rate: float = 2e-3
    """Its learning rate."""
    full_epochs: float = 3.0
    """Of full fine-tuning."""
    full_rate: float = 5e-4
    """Its learning rate."""
    memory: bool = True
    """Whether to measure memory."""


class LmBench:
    """Runs rows.

    Args:
        work: The documents and the model.
        options: The command line's.
        folder: For scratch files.
        tell: Given progress.
    """

    def __init__(self, work: LmWorkload, options: LmOptions, folder: Path, tell: Tell) -> None:
        self._work = work
        self._options = options
        self._folder = folder
        self._tell = tell
        self._tuner = Tuner(work, shared_language_model(work.backbone), tell)
        self._peaks: dict[str, int | None] = {}

    @property
    def tokens(self) -> int:
        """Of training, all devices together."""
        return self._tuner.tokens

    def run(self, row: str, seed: int) -> LmMeasured:
        """Run one method with one seed."""
        started = time.monotonic()
        measured = ROWS[row](self, seed)
        measured.wall_s = time.monotonic() - started
        if self._options.memory and row in _METHODS:
            measured.peak_bytes = self._peak_bytes(_METHODS[row])
        return measured

    def frozen(self, seed: int) -> LmMeasured:
        """The model as it is."""
        return _tuned("frozen", seed, self._tuner.frozen(), 0.0)

    def lora(self, seed: int) -> LmMeasured:
        """LoRA, all of the text on one machine."""
        epochs = self._options.lora_epochs
        return _tuned("lora", seed, self._tuner.lora(seed, epochs, self._options.lora_rate), epochs)

    def full(self, seed: int) -> LmMeasured:
        """Every weight, all of the text on one machine."""
        epochs = self._options.full_epochs
        return _tuned("full", seed, self._tuner.full(seed, epochs, self._options.full_rate), epochs)

    def _peak_bytes(self, method: str) -> int | None:
        """Peak memory above the loaded model over a few batches of windows; measured once a method."""
        if method not in self._peaks:
            texts = self._work.train[: BATCH * _BATCHES]
            request = Request(
                method=method,
                batches=[texts[start : start + BATCH] for start in range(0, len(texts), BATCH)],
                max_tokens=self._work.max_tokens,
                backbone=self._work.backbone,
            )
            try:
                self._peaks[method] = measure(request).peak_bytes
            except ProbeError as exc:
                self._tell(str(exc))
                self._peaks[method] = None
        return self._peaks[method]


def _tuned(row: str, seed: int, tuned: LmTuned, epochs: float) -> LmMeasured:
    return LmMeasured(
        row=row,
        seed=seed,
        perplexity=tuned.perplexity,
        trainable=tuned.trainable,
        device_cpu_s=tuned.cpu_s,
        forwards=epochs,
        backwards=epochs,
    )


ROWS: Final[Mapping[str, Callable[[LmBench, int], LmMeasured]]] = {
    "frozen": LmBench.frozen,
    "lora": LmBench.lora,
    "full": LmBench.full,
}
"""By the name that the command line takes."""
