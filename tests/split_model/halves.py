"""Tiny models for the two halves, and what a device and a trainer do with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.zoo import WORDS, build, tokenizer
from sidestream.backbone.text_input import Tokens
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.contract.lora import LoraSpec
from sidestream.contract.plan import Precision
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.split_model.lower_half import LowerHalf
from sidestream.split_model.split_model import SplitModel

TARGETS: Final[Mapping[str, tuple[str, ...]]] = {
    "distilbert": ("q_lin", "v_lin"),
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "v"),
    "smollm3": ("q_proj", "v_proj"),
}
"""Where peft's table has none."""
LABELS: Final = 3


def spec(kind: str) -> LoraSpec:
    return LoraSpec(rank=4, alpha=8.0, targets=TARGETS.get(kind, ()))


def model_of(kind: str, *, head: bool = False, seed: int = 0) -> Any:
    """Of transformers."""
    made = build(kind, head=head, seed=seed)
    assert made is not None
    return made


def backbone(kind: str, layers: int = 0, *, lm: bool = False, precision: Precision = "f32") -> TorchBackbone:
    load = TorchLanguageModel if lm else TorchBackbone
    return load(model_of(kind, head=lm), tokenizer(), layers=layers, name=kind, precision=precision)


def lower_half(kind: str, cut: int, *, lm: bool = False, precision: Precision = "f32") -> LowerHalf:
    return LowerHalf(backbone(kind, cut, lm=lm, precision=precision), spec(kind))


def split_model(kind: str, *, lm: bool = False, precision: Precision = "f32", seed: int = 0) -> SplitModel:
    task = Task.CAUSAL_LM if lm else Task.TEXT_CLASSIFICATION
    made = backbone(kind, lm=lm, precision=precision)
    return SplitModel(made, spec(kind), task=task, labels=LABELS, seed=seed)


def scattered(model: SplitModel, seed: int = 5) -> dict[str, Floats]:
    """Values for every parameter, none of them zero."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(scale=0.2, size=array.shape).astype(np.float32)
        for name, array in model.arrays().items()
    }


def lower_part(model: SplitModel, cut: int) -> dict[str, Floats]:
    """What a device with so many layers needs of the trainer's adapters."""
    layers = {name: model.layer_of(name) for name in model.parameters}
    mine = {name for name, layer in layers.items() if layer is not None and layer < cut}
    return {name: array for name, array in model.arrays().items() if name in mine}


def texts(rows: int, seed: int, longest: int = 9) -> list[str]:
    """Of unequal lengths."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(2, longest))) for _ in range(rows)]


def tokens_of(model: TorchBackbone, rows: int, seed: int) -> Tokens:
    return model.text_input.read(texts(rows, seed), 32)


def loss_of(model: SplitModel, answers: Tensor, targets: Tensor) -> Tensor:
    logits = answers if model.head is None else model.head(answers)
    return functional.cross_entropy(logits, targets)


def some_targets(model: SplitModel, tokens: Tokens, seed: int) -> Tensor:
    """For each row, or each token of a language model."""
    rng = np.random.default_rng(seed)
    if model.head is None:
        return torch.from_numpy(rng.integers(LABELS, size=len(tokens.ids)))
    return torch.from_numpy(rng.integers(model.head.vocabulary, size=int(tokens.mask.sum())))
