"""Fewer bits for a frozen model's weights, in place, and without ever holding much more than them.

Weights are loaded by mapping their file. What has been converted is let go of as it goes; otherwise a model
in fewer bits would take more memory than it took before, until all of it is converted and beyond.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.backbone.torch_runtime.mapped_weights import MappedWeights, trim_heap
from sidestream.contract.errors import BackboneError
from sidestream.contract.plan import Precision


def convert(model: nn.Module, precision: Precision, run: Callable[[], Tensor], name: str) -> None:
    """Change the weights' precision in place, and see that the model still runs.

    Args:
        model: The model, in f32.
        precision: The one wanted.
        run: Gives the last layer's state of something.
        name: For messages.

    Raises:
        BackboneError: it cannot be kept so.
    """
    if precision == "f32":
        return
    if precision == "int8" and not any(isinstance(one, nn.Linear) for one in model.modules()):
        raise BackboneError(f"{name}: has no linear layers to keep in int8; use f32 or bf16")
    try:
        to_int8(model) if precision == "int8" else to_bf16(model)
        with torch.inference_mode():
            state = run()
    except Exception as exc:  # torch raises whatever its parts raise
        raise BackboneError(f"{name}: cannot run in {precision}: {exc}; use f32") from exc
    if not torch.isfinite(state).all():
        raise BackboneError(f"{name}: gives no finite activations in {precision}; use f32")


def to_bf16(model: nn.Module) -> None:
    """All weights, in place. Not the buffers: rotary frequencies in bf16 would turn by wrong angles."""
    mapped = MappedWeights(model.parameters())
    for _, parameter in mapped.sparing(model.named_parameters()):
        parameter.data = parameter.data.to(torch.bfloat16)
    _tidy()


def to_int8(model: nn.Module) -> None:
    """Weights of linear layers, in place; what goes into these is quantised in each pass.

    Other weights stay where they are: of a mapped file only the pages that are read take memory.
    """
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if torch.backends.quantized.engine == "none" and engines:
        torch.backends.quantized.engine = engines[0]
    mapped = MappedWeights(model.parameters())
    with warnings.catch_warnings():
        # torch means to move this to another package, which we would rather not need.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        quantise: Any = torch.ao.quantization.quantize_dynamic
        # A scale for each output channel: with one a layer, MiniLM's sixth layer is hardly recognisable.
        kind = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        for part in list(model.modules()):
            if any(isinstance(one, nn.Linear) for one in part.children()):
                quantise(part, kind, dtype=torch.qint8, inplace=True)
                mapped.let_go()
    _tidy()


def _tidy() -> None:
    """Free the weights as they were loaded: a cycle holds the modules that were replaced."""
    gc.collect()
    trim_heap()
