"""Tiny random language models of real transformers classes, with a tokenizer, saved as any model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.agent.tiny import LAYERS, POSITIONS, SPECIAL, WIDTH, WORDS, _tokenizer

VOCABULARY: Final = len(SPECIAL) + len(WORDS)
_DEEP: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_ROTARY: Final = {**_DEEP, "intermediate_size": 2 * WIDTH, "num_key_value_heads": 2}
_HEADED: Final = {**_ROTARY, "head_dim": 8}
_CONFIGS: Final[dict[str, Any]] = {
    "gpt2": lambda: GPT2Config(
        **{key: _DEEP[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=POSITIONS,
        initializer_range=0.3,
    ),
    "opt": lambda: OPTConfig(**_DEEP, ffn_dim=64, word_embed_proj_dim=WIDTH, init_std=0.3),
    "opt-350m": lambda: OPTConfig(
        **_DEEP, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False, init_std=0.3
    ),
    "llama": lambda: LlamaConfig(**_ROTARY, initializer_range=0.3),
    "qwen2": lambda: Qwen2Config(**_ROTARY, tie_word_embeddings=True, initializer_range=0.3),
    "qwen3": lambda: Qwen3Config(**_HEADED, initializer_range=0.3),
    "gemma": lambda: GemmaConfig(**_HEADED, initializer_range=0.3),
    "gemma2": lambda: Gemma2Config(**_HEADED, final_logit_softcapping=3.0, initializer_range=0.3),
    "gemma3": lambda: Gemma3TextConfig(**_HEADED, initializer_range=0.3),
}
FAMILIES: Final = tuple(_CONFIGS)


def save_tiny_lm(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Write a random language model of ``family``; its norms are random too."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(_CONFIGS[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    (_letters() if family == "qwen2" else _tokenizer(decoder=True)).save_pretrained(folder)
    return folder


def _letters() -> Any:
    """Transformers 5 reads whatever lies beside a Qwen 2 as byte pairs: here single letters."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *"Ġaceghiklmnopqrstuwx"])}
    letters = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="<unk>", eos_token="</s>", model_max_length=POSITIONS
    )
