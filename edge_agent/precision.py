"""Fewer bits for a frozen model's weights, in place."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn


def to_bf16(model: nn.Module) -> None:
    """All weights, in place. Not the buffers: rotary frequencies in bf16 would turn by wrong angles."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def to_int8(model: nn.Module) -> None:
    """Weights of linear layers, in place; what goes into these is quantised in each pass."""
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if torch.backends.quantized.engine == "none" and engines:
        torch.backends.quantized.engine = engines[0]
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for parameter in model.parameters():
        if id(parameter) not in linear:  # it stays, and as a part of a mapped file would keep all of that
            parameter.data = parameter.data.clone()
    with warnings.catch_warnings():
        # torch means to move this to another package, which we would rather not need.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        quantise: Any = torch.ao.quantization.quantize_dynamic
        # A scale for each output channel: with one a layer, MiniLM's sixth layer is hardly recognisable.
        kind = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        quantise(model, kind, dtype=torch.qint8, inplace=True)
