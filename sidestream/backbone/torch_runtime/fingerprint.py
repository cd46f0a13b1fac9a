"""What tells one backbone from another: a hash of its weights, its tokenizer and its configuration.

Decision 0022 says what of a configuration goes in, and why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from torch import Tensor, nn

from sidestream.backbone.torch_runtime.layer_stack import position_offset, text_config

_PROBE: Final = "Ünïcode, CamelCase and don't: 3.14 * 2,000 €; 中文 عربى 🙂\tend\n"
_IRRELEVANT: Final = frozenset(
    {
        *("_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version", "dtype"),
        *("torch_dtype", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "language"),
        *("task_specific_params", "tokenizer_class", "prefix", "use_cache", "output_attentions"),
        *(
            "output_hidden_states",
            "return_dict",
            "use_return_dict",
            "gradient_checkpointing",
            "pretraining_tp",
        ),
        *("chunk_size_feed_forward", "tie_word_embeddings", "num_hidden_layers", "vocab_size", "torchscript"),
        *("n_layer", "n_layers", "num_layers"),
        *("classifier_activation", "classifier_bias", "classifier_pooling", "is_encoder_decoder"),
        *("router_aux_loss_coef", "output_router_logits", "use_mrl", "quantization_config"),
    }
)
"""Names, versions, labels, what only training or a head looks at, and what the weights tell."""
_IRRELEVANT_PARTS: Final = ("drop", "initializer", "init_", "token_id", "summary_", "attn_impl")
_ROPE: Final = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})


def digests_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, bytes]:
    """By name, a hash of each weight's type, shape and bytes."""
    return {name: _tensor_digest(parameter) for name, parameter in parameters}


def fingerprint_of(digests: Iterable[bytes], preprocessing: bytes, model: nn.Module) -> str:
    """A hash of every weight's digest, of what the preprocessor does, and of the configuration.

    Neither parameter names nor the preprocessor's file go in: both change between versions of transformers
    while the model stays the same. Of the configuration goes in what changes what the model computes.
    """
    total = hashlib.blake2b(digest_size=16, person=b"sidestream-model")
    for digest in sorted(digests):
        total.update(digest)
    total.update(preprocessing)
    total.update(json.dumps(said(model), sort_keys=True, default=str, separators=(",", ":")).encode())
    return total.hexdigest()


def tokenizing(tokenizer: Any) -> bytes:
    """What a tokenizer does: its vocabulary, and the tokens of a text that holds nearly everything."""
    vocabulary = "\0".join(f"{token}\1{index}" for token, index in sorted(tokenizer.get_vocab().items()))
    probed = repr(tokenizer(_PROBE, verbose=False)["input_ids"])
    return hashlib.blake2b(vocabulary.encode(errors="replace")).digest() + probed.encode()


def said(model: nn.Module) -> dict[str, Any]:
    """What a model's configuration says beside its class's defaults, and that its weights do not tell.

    A default that is written out is as one that is not, and so is a field that this version of transformers
    does not know, for it computes nothing by it.
    """
    config = text_config(model)
    defaults = _defaults(config)
    kept = {
        key: _plain(value)
        for key, value in config.to_dict().items()
        if not _is_irrelevant(key)
        and key not in _ROPE
        and (not defaults or key in defaults)
        and value != defaults.get(key)
        and not _all_see_all(key, value)
    }
    kept |= {"model_type": config.model_type, **_rope(config)}
    if offset := position_offset(model):
        kept["positions_from"] = offset
    return kept


def _rope(config: Any) -> dict[str, Any]:
    """Rotary positions, in one form: transformers 4 and 5 each write them in their own."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        rope.setdefault(key, getattr(config, key, None))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type")
    plain = {"rope_type": "default", "partial_rotary_factor": 1}
    kept = {key: _plain(value) for key, value in rope.items() if value not in (None, plain.get(key))}
    return {"rope": kept} if kept else {}


def _all_see_all(key: str, value: Any) -> bool:
    """Layers of which none is of a special kind; older versions do not list them."""
    return key == "layer_types" and set(value or ()) <= {"full_attention"}


def _defaults(config: Any) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = type(config)().to_dict()
    except Exception:  # some cannot be made of nothing, each for a reason of its own
        return {}
    return found


def _is_irrelevant(key: str) -> bool:
    return key in _IRRELEVANT or any(part in key for part in _IRRELEVANT_PARTS)


def _plain(value: Any) -> Any:
    """Whole numbers as such, wherever they stand: JSON files write 10000 and 10000.0 alike."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items() if not _is_irrelevant(str(key))}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tensor_digest(parameter: Tensor) -> bytes:
    array = parameter.detach().cpu().numpy().astype("<f4", copy=False)
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=32)
    digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.digest()
