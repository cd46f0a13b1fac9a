"""Adapting a language model without a side-network: not at all, LoRA, every weight.

All on one machine, which sees all devices' documents. Legend: K windows, T tokens of the longest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.baselines import schedule
from benchmarks.lm_data import LmWorkload
from benchmarks.lora import add_lora
from benchmarks.metered import count_targets
from benchmarks.program import Tell
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.backbone.torch_runtime.saved_model import read_model
from sidestream.backbone.windows import Window
from sidestream.contract.tasks import NO_TARGET

BATCH: Final = 8
_TELL_EVERY_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class LmTuned:
    """What came of it."""

    perplexity: float
    """A token, of the held-out documents."""
    trainable: int
    """Parameters trained."""
    cpu_s: float
    """CPU time of training."""


class Tuner:
    """Tunes one copy of the model after another.

    Args:
        work: The documents and the model.
        model: The model as agents load it: cuts documents into windows.
        tell: Given progress.
    """

    def __init__(self, work: LmWorkload, model: TorchLanguageModel, tell: Tell) -> None:
        self._work = work
        self._tell = tell
        self._train = work.windows(model, work.train)
        self._held_out = work.windows(model, work.held_out)
        self.tokens = sum(count_targets(window) for window in self._train)
        """That are predicted in one epoch."""

    def frozen(self) -> LmTuned:
        """The model as it is."""
        return LmTuned(perplexity=self._perplexity(self._load()), trainable=0, cpu_s=0.0)

    def lora(self, seed: int, epochs: float, rate: float) -> LmTuned:
        """LoRA on attention."""
        torch.manual_seed(seed)
        model = self._load()
        add_lora(model)
        return self._tune(model, seed, epochs, rate)

    def full(self, seed: int, epochs: float, rate: float) -> LmTuned:
        """Every weight."""
        torch.manual_seed(seed)
        return self._tune(self._load().requires_grad_(True), seed, epochs, rate)

    def _tune(self, model: Any, seed: int, epochs: float, rate: float) -> LmTuned:
        trained = [one for one in model.parameters() if one.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=rate)
        updates = max(1, math.ceil(epochs * len(self._train) / BATCH))
        batches = self._batches(np.random.default_rng(seed))
        model.train()
        began, told_s = time.thread_time(), time.monotonic()
        for update in range(updates):
            for group in optimiser.param_groups:
                group["lr"] = rate * schedule(update, updates)
            optimiser.zero_grad(set_to_none=True)
            loss = window_loss(model, next(batches))
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            if time.monotonic() - told_s > _TELL_EVERY_S:
                told_s = time.monotonic()
                self._tell(f"{update + 1} of {updates} updates, loss {float(loss.detach()):.3f}")
        # Autograd runs backward passes on a CPU in the calling thread, so the thread's time holds them.
        cpu_s = time.thread_time() - began
        return LmTuned(
            perplexity=self._perplexity(model), trainable=sum(one.numel() for one in trained), cpu_s=cpu_s
        )

    def _batches(self, rng: np.random.Generator) -> Iterator[list[Window]]:
        """Epochs in random order, without end."""
        while True:
            order = rng.permutation(len(self._train))
            for start in range(0, len(order), BATCH):
                yield [self._train[row] for row in order[start : start + BATCH]]

    def _perplexity(self, model: Any) -> float:
        model.eval()
        total = 0.0
        with torch.inference_mode():
            for start in range(0, len(self._held_out), 4 * BATCH):
                part = self._held_out[start : start + 4 * BATCH]
                total += float(window_loss(model, part)) * sum(map(count_targets, part))
        return math.exp(total / sum(map(count_targets, self._held_out)))

    def _load(self) -> Any:
        model, _ = read_model(self._work.backbone, AutoModelForCausalLM)
        return model.float().requires_grad_(False)


def window_loss(model: Any, windows: Sequence[Window]) -> Tensor:
    """The mean loss of all tokens predicted in K windows."""
    ids = _padded([window.inputs for window in windows], 0)
    targets = _padded([window.targets for window in windows], NO_TARGET)
    lengths = torch.tensor([len(window.inputs) for window in windows])
    mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits  # [K, T, V]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
