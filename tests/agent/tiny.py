"""Tiny random models of real transformers classes, with a tokenizer, saved as any model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

WORDS = [
    *("turn", "switch", "the", "a", "lights", "light", "kitchen", "bedroom", "on", "off"),
    *("warm", "cold", "heat", "up", "down", "please", "now", "end", "of", "day"),
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WIDTH = 32
LAYERS = 4
POSITIONS = 48


def save_tiny(folder: Path, family: str, *, seed: int = 0, layers: int = LAYERS, width: int = WIDTH) -> Path:
    """Write a random model of ``family``."""
    torch.manual_seed(seed)
    model = _model(family, layers, width)
    model.save_pretrained(folder)
    _tokenizer(decoder=family in ("opt", "gpt2", "llama")).save_pretrained(folder)
    return folder


def _model(family: str, layers: int, width: int) -> Any:
    shared = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    deep = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    }
    if family == "bert":
        return BertModel(BertConfig(**shared, **deep, intermediate_size=2 * width))
    if family == "roberta":
        deep["max_position_embeddings"] = POSITIONS + 2
        return RobertaModel(
            RobertaConfig(**shared, **deep, intermediate_size=2 * width), add_pooling_layer=False
        )
    if family == "opt":
        return OPTModel(OPTConfig(**shared, **deep, ffn_dim=2 * width, word_embed_proj_dim=width))
    if family == "llama":
        del shared["pad_token_id"]
        return LlamaModel(LlamaConfig(**shared, **deep, intermediate_size=2 * width))
    assert family == "gpt2"
    del shared["pad_token_id"]
    return GPT2Model(GPT2Config(**shared, n_embd=width, n_layer=layers, n_head=4, n_positions=POSITIONS))


def _tokenizer(*, decoder: bool) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if not decoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        names["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **names)
