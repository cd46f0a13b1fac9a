"""LoRA by peft on a whole model, which methods are compared with."""

from __future__ import annotations

from typing import Any, Final

import peft

from sidestream.contract.errors import ConfigError

_RANK: Final = 8
_ATTENTION: Final = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("c_attn",))


def add_lora(model: Any) -> None:
    """Add LoRA, r = 8, to attention's queries and values; nothing else of the model is trained then.

    Raises:
        ConfigError: if the model's attention is not known.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = next((list(pair) for pair in _ATTENTION if set(pair) <= names), None)
    if targets is None:
        raise ConfigError("--rows", f"no LoRA: {type(model).__name__}'s attention is not known")
    config = peft.LoraConfig(r=_RANK, lora_alpha=2 * _RANK, lora_dropout=0.05, target_modules=targets)
    peft.inject_adapter_in_model(config, model)
