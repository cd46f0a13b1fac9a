"""What tells one backbone from another: a hash of its weights and of what its tokenizer does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from torch import Tensor

_PROBE: Final = "Ünïcode, CamelCase and don't: 3.14 * 2,000 €; 中文 عربى 🙂\tend\n"


def fingerprint_of(parameters: Iterable[tuple[str, Tensor]], tokenizer: Any) -> str:
    """A hash of every weight's type, shape and bytes, and of what the tokenizer does.

    Neither parameter names nor the tokenizer's file go in: both change between versions of transformers while
    the model stays the same.
    """
    weights = sorted(_tensor_digest(parameter) for _, parameter in parameters)
    total = hashlib.blake2b(digest_size=16, person=b"sidestream-model")
    for digest in weights:
        total.update(digest)
    vocabulary = "\0".join(f"{token}\1{index}" for token, index in sorted(tokenizer.get_vocab().items()))
    total.update(hashlib.blake2b(vocabulary.encode(errors="replace")).digest())
    total.update(repr(tokenizer(_PROBE, verbose=False)["input_ids"]).encode())
    return total.hexdigest()


def _tensor_digest(parameter: Tensor) -> bytes:
    array = parameter.detach().cpu().numpy().astype("<f4", copy=False)
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=32)
    digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.digest()
