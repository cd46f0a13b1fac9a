"""Backbones of known shapes with random weights, of the real transformers classes; and texts for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    OPTConfig,
    OPTModel,
    PreTrainedTokenizerFast,
)

from sidestream.backbone.torch_runtime.backbone import TorchBackbone

_WORDS: Final = 1000
_PAD: Final = "<pad>"


def _bert(width: int, layers: int, heads: int, inner: int, vocabulary: int) -> Any:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
    )
    return BertModel(config, add_pooling_layer=False)


def _opt(width: int, layers: int, heads: int, *, projected: int = 0) -> Any:
    config = OPTConfig(
        vocab_size=50272,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        max_position_embeddings=2048,
        word_embed_proj_dim=projected or width,
        do_layer_norm_before=not projected,
        use_cache=False,
    )
    return OPTModel(config)


SHAPES: Final[Mapping[str, tuple[int, Callable[[], Any]]]] = {
    "tiny": (200_000, lambda: _bert(32, 4, 4, 64, 1001)),
    "tiny-deep": (400_000, lambda: _bert(32, 12, 4, 64, 1001)),
    "tiny-projected": (1_800_000, lambda: _opt(64, 4, 4, projected=32)),
    "minilm": (22_600_000, lambda: _bert(384, 6, 12, 1536, 30522)),
    "bert-base": (109_500_000, lambda: _bert(768, 12, 12, 3072, 30522)),
    "opt-125m": (125_000_000, lambda: _opt(768, 12, 12)),
    "opt-350m": (331_000_000, lambda: _opt(1024, 24, 16, projected=512)),
    "opt-1.3b": (1_316_000_000, lambda: _opt(2048, 24, 32)),
}
"""By name: parameters, about, and how to make one. The tiny ones are for tests."""


def random_backbone(shape: str, layers: Callable[[int], int] = lambda depth: 0) -> TorchBackbone:
    """A backbone of a shape, cut to ``layers`` of its depth, 0 for all."""
    torch.manual_seed(0)
    _, make = SHAPES[shape]
    model = make()
    return TorchBackbone(
        model,
        _tokenizer(int(model.config.vocab_size)),
        layers=layers(int(model.config.num_hidden_layers)),
        name=shape,
    )


def save_backbone(shape: str, folder: Path) -> Path:
    """Write a random model of a shape and its tokenizer, as any model is kept."""
    torch.manual_seed(0)
    _, make = SHAPES[shape]
    model = make()
    model.save_pretrained(folder)
    _tokenizer(int(model.config.vocab_size)).save_pretrained(folder)
    return folder


def random_decoder(shape: str) -> tuple[Any, Any]:
    """A causal language model of a shape, with its head, and a tokenizer."""
    torch.manual_seed(0)
    _, make = SHAPES[shape]
    config = make().config
    return AutoModelForCausalLM.from_config(config), _tokenizer(int(config.vocab_size))


def random_texts(count: int, tokens: int) -> list[str]:
    """Texts of exactly so many tokens."""
    rng = np.random.default_rng(0)
    return [" ".join(f"w{word}" for word in rng.integers(_WORDS, size=tokens)) for _ in range(count)]


def _tokenizer(tokens: int) -> Any:
    """As many words as the model has embeddings; texts are of the first thousand."""
    vocabulary = {_PAD: 0, **{f"w{index}": index + 1 for index in range(tokens - 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, unk_token=_PAD, model_max_length=512
    )
