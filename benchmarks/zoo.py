"""Every text model class that transformers can build, tiny and random: what a backbone may be made of.

The classes are those that transformers' own mappings name for causal or masked language modelling, or for
classifying texts. A configuration is the class's default with small numbers; where an architecture's numbers
hang together in a way of their own, a line below says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

WORDS: Final = tuple(f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "o"))
POSITIONS: Final = 48
LAYERS: Final = 4
_SPECIAL: Final = ("<s>", "<pad>", "</s>", "<unk>")
VOCABULARY: Final = len(_SPECIAL) + len(WORDS)
_MORE: Final = ("clip", "clip_text_model", "led", "longt5", "switch_transformers")
_LARGEST: Final = 20_000_000
"""Parameters; what stays larger than this, small numbers or not, cannot be built tiny."""
_SIZES: Final[Mapping[int, tuple[str, ...]]] = {
    32: (
        *("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"),
        *("embed_dim", "hidden_dim", "state_size", "attention_hidden_size", "entity_emb_size"),
    ),
    LAYERS: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
        *("num_decoder_layers", "num_blocks", "num_attention_heads", "n_head", "n_heads", "num_heads"),
        *("encoder_attention_heads", "decoder_attention_heads", "num_experts", "num_local_experts"),
        *("n_routed_experts", "moe_num_experts", "zero_expert_num", "linear_num_value_heads"),
    ),
    2: (
        "linear_num_key_heads",
        "num_key_value_heads",
        "num_kv_heads",
        "num_experts_per_tok",
        "moe_k",
        "moe_topk",
        "moe_top_k",
    ),
    64: (
        *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff", "d_inner"),
        *("dff", "ffn_hidden_size", "moe_intermediate_size", "expert_ffn_hidden_size", "inner_dim"),
        *("shared_expert_intermediate_size",),
    ),
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input", "entity_vocab_size"),
    POSITIONS: (
        *("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len", "n_position"),
        *("max_sequence_length", "position_embeddings"),
    ),
    8: (
        *(
            "head_dim",
            "d_head",
            "d_kv",
            "mamba_d_head",
            "mamba_head_dim",
            "v_head_dim",
            "attention_head_size",
        ),
        *("linear_key_head_dim", "linear_value_head_dim"),
    ),
    16: (
        *("q_lora_rank", "kv_lora_rank", "mamba_d_state", "ssm_state_size", "mamba_chunk_size", "chunk_size"),
    ),
    1: ("n_group", "topk_group", "first_k_dense_replace"),
    0: ("bos_token_id",),
}
_SMALL: Final = {name: size for size, names in _SIZES.items() for name in names} | {
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: Final[dict[str, Any]] = {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
_OFFSET: Final[dict[str, Any]] = {"max_position_embeddings": POSITIONS + 2}
_MAMBA: Final[dict[str, Any]] = {"mamba_n_heads": 8, "mamba_d_head": 8}
_CHUNKS: Final = {"lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4}
_OWN: Final[Mapping[str, dict[str, Any]]] = {
    **dict.fromkeys(
        (
            *(
                "roberta",
                "camembert",
                "xlm-roberta",
                "xlm-roberta-xl",
                "longformer",
                "mpnet",
                "luke",
                "ibert",
            ),
            *("roberta-prelayernorm", "data2vec-text", "xmod", "mra", "yoso", "nystromformer"),
        ),
        _OFFSET,
    ),
    **dict.fromkeys(
        (
            *(
                "axk1",
                "axk2",
                "deepseek_v2",
                "deepseek_v3",
                "deepseek_v32",
                "dots3_note_text",
                "longcat_flash",
            ),
            *("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu", "mistral4"),
        ),
        _LATENT,
    ),
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "clip": {
        "text_config": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    },
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 3, **_OFFSET},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "funnel": {"block_sizes": [2, 2], "d_head": 8},
    "gemma3n_text": {"layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "longformer": {**_OFFSET, "attention_window": [8] * LAYERS},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (4, 12), **_CHUNKS},
    "zaya": {"num_experts_per_tok": 1},
}


def text_models() -> tuple[str, ...]:
    """The names of all text models, those too that cannot be built tiny."""
    named = {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    named |= set(_MORE)
    return tuple(sorted(named & set(MODEL_MAPPING_NAMES)))


def is_language_model(kind: str) -> bool:
    """Whether transformers has the model with an output head, too."""
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def build(kind: str, *, head: bool = False, seed: int = 0) -> Any | None:
    """A random model, with its output head or without; None if it cannot be built tiny."""
    auto = AutoModelForCausalLM if head else AutoModel
    try:
        config = _config(kind)
        with torch.device("meta"):
            size = sum(one.numel() for one in auto.from_config(config).parameters())
    except Exception:  # each class checks its numbers in a way of its own
        return None
    if size > _LARGEST:
        return None
    torch.manual_seed(seed)
    model: Any = auto.from_config(_config(kind))
    return model.eval()


def tokenizer() -> Any:
    """Words, with a mark on either side of a text."""
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=POSITIONS,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def _config(kind: str) -> Any:
    made = CONFIG_MAPPING[kind]
    defaults = made().to_dict()
    small = {
        name: size
        for name, size in _SMALL.items()
        if defaults.get(name) is not None and not isinstance(defaults[name], list | dict)
    }
    return made(**small | _OWN.get(kind, {}))
