"""Where a model keeps its stack of layers, and how much it can take: read from what transformers built."""

from __future__ import annotations

from typing import Any

from torch import nn

from contract.errors import BackboneError


def text_config(model: nn.Module) -> Any:
    """The configuration of a model, or of the text model in it."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def truncate(model: nn.Module, keep: int, name: str) -> nn.ModuleList:
    """Find the stack of layers, delete all after the first ``keep``, and return it.

    Raises:
        BackboneError: there is no stack of layers that can be tapped, or it has fewer than ``keep``.
    """
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise BackboneError(f"{name}: is an encoder-decoder; use an encoder or a decoder")
    count = int(getattr(config, "num_hidden_layers", 0))
    stacks = [
        (parent, attribute, module)
        for parent in model.modules()
        for attribute, module in parent.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == count > 0
    ]
    if not stacks:
        raise BackboneError(f"{name}: a {type(model).__name__} has no stack of layers that can be tapped")
    if not 0 <= keep <= count:
        raise BackboneError(f"{name}: has {count} layers, {keep} were asked for")
    parent, attribute, stack = stacks[0]
    if keep:
        stack = nn.ModuleList(stack[:keep])
        setattr(parent, attribute, stack)
        config.num_hidden_layers = keep  # some models count by it
    return stack


def longest_input(model: nn.Module, tokenizer: Any) -> int:
    """Tokens that the model and its tokenizer can take; RoBERTa's positions start after the padding id."""
    positions = int(getattr(text_config(model), "max_position_embeddings", 0) or 10**6)
    offset = max(
        (
            module.padding_idx + 1
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            and module.num_embeddings == positions
            and module.padding_idx is not None
        ),
        default=0,
    )
    return min(positions - offset, int(min(tokenizer.model_max_length, 10**6)))
