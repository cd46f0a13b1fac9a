"""What a device does for one batch of text in a language-model job, method by method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from benchmarks.lm_data import TIER, trainer_settings
from benchmarks.lm_tuned import window_loss
from benchmarks.lora import add_lora
from benchmarks.steps import Step, Traffic, TrainStep
from benchmarks.workload import JOB
from edge_agent.batches.token_maker import TokenMaker
from edge_agent.samples.sample import Sample
from edge_agent.store.streams import Slot
from side_trainer.rows.training_rows import FamilyRows, MiniBatch
from side_trainer.side_tuning.token_loss import token_loss
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.contract.plan import Plan, tap_layers
from sidestream.contract.wire import TARGET_MESSAGE_BYTES
from sidestream.side_network.network import SideNetwork


class Loaded(NamedTuple):
    """A decoder for a step."""

    whole: Any
    """Transformers' own, with its head; what a method that trains needs."""
    model: TorchLanguageModel
    """The agent's, of the same weights."""


class TokenStep:
    """Sidestream's: forward, sample, quantise, pack, by the agent's own code and the task's defaults."""

    trainable = 0

    def __init__(self, loaded: Loaded, tokens: int) -> None:
        model, config = loaded.model, trainer_settings("measured", tokens, {})
        tier = msgspec.structs.replace(
            config.tiers[TIER].to_plan(),
            depth=model.depth,
            width=model.width,
            taps=tap_layers(model.depth, config.side_network.blocks),
            fingerprint=model.fingerprint,
            head=model.head_fingerprint,
            vocabulary=model.head.vocabulary,
        )
        plan = Plan(job=JOB, run="0" * 32, revision=0, task=config.task, labels=(), tiers={TIER: tier})
        self._maker = TokenMaker(model, plan, TIER, TARGET_MESSAGE_BYTES)

    def warm(self, texts: Sequence[str]) -> None:
        self.run(texts)

    def run(self, texts: Sequence[str]) -> Traffic:
        ready = [self._maker.ready(Sample(text, None, b""))[0] for text in texts]
        sampled = self._maker.compute(ready, lambda lengths: self._maker.sampling)
        rows, up = np.arange(len(sampled.lengths)), 0
        for part in self._maker.split(sampled, rows):
            targets = [None] * len(rows)
            keys = [index.to_bytes(8, "big") for index in range(len(part))]
            packed = self._maker.packer(sampled, targets, part, keys)
            up += len(packed(Slot("0" * 32, 1, 1, 0, "")))
        return Traffic(up=up, down=0)


class LearnStep:
    """Not a device's: the trainer's update on the tokens of such a batch, with the frozen head alone."""

    def __init__(self, loaded: Loaded, tokens: int) -> None:
        config, self._model, self._tokens = trainer_settings("measured", tokens, {}), loaded.model, tokens
        self._network = SideNetwork(config.side_network, labels=0, seed=0, task=config.task)
        self._network.add_align(TIER, loaded.model.width)
        self._taps = len(tap_layers(loaded.model.depth, config.side_network.blocks))
        self._optimiser = torch.optim.AdamW(self._network.parameters(), lr=1e-4, fused=True)
        self.trainable = sum(parameter.numel() for parameter in self._network.parameters())

    def warm(self, texts: Sequence[str]) -> None:
        self._learn(len(texts), 4)

    def run(self, texts: Sequence[str]) -> Traffic:
        self._learn(len(texts), self._tokens)
        return Traffic(up=0, down=0)

    def _learn(self, rows: int, tokens: int) -> None:
        taps = torch.randn(self._taps, rows, tokens, self._model.width)
        batch = MiniBatch(
            families=[FamilyRows(align=TIER, activations=taps)],
            mask=torch.ones(rows, tokens, dtype=torch.bool),
            targets=torch.randint(self._model.head.vocabulary, (rows, tokens)),
            tiers=[TIER] * rows,
            per_vector=True,
            weights=torch.ones(rows),
        )
        self._optimiser.zero_grad(set_to_none=True)
        loss, _ = token_loss(self._network, batch, lambda align: self._model.head, 0.0)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()


def _lora(loaded: Loaded, tokens: int) -> Step:
    add_lora(loaded.whole)
    return TrainStep(loaded.whole, _loss(loaded, tokens))


def _full(loaded: Loaded, tokens: int) -> Step:
    return TrainStep(loaded.whole.requires_grad_(True), _loss(loaded, tokens))


def _loss(loaded: Loaded, tokens: int) -> Callable[[Sequence[str]], Tensor]:
    def loss(texts: Sequence[str]) -> Tensor:
        windows = [window for text in texts for window in loaded.model.windows(text, None, tokens)[:1]]
        return window_loss(loaded.whole, windows)

    return loss


LM_STEPS: Final[Mapping[str, Callable[[Loaded, int], Step]]] = {
    "lm-agent": TokenStep,
    "lm-trainer": LearnStep,
    "lm-lora": _lora,
    "lm-full": _full,
}
"""Methods by name, the trainer's beside them: made from a loaded decoder and the most tokens of a window."""
