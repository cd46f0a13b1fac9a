"""What public text says of token ids before anything is seen of them: how often, and after which other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.sampled import Ints
from sidestream.contract.tensors import Floats

_UNSEEN: Final = 0.05
_PAIRS: Final = 0.7
_NEVER: Final = -1e9
_TRIED = ("a", "the dog")


class Language:
    """Counts of a public text's tokens, and of two in a row.

    Args:
        backbone: Whose tokens.
        texts: [T] each, what stands around every text included.
    """

    def __init__(self, backbone: Backbone, texts: Sequence[Ints]) -> None:
        rows = backbone.text_input.rows or int(max(text.max() for text in texts)) + 1
        self.before, self.after = _around(backbone)
        """Token ids that stand before and after every text."""
        inner = [text[len(self.before) : len(text) - len(self.after)] for text in texts]
        counts = np.bincount(np.concatenate([*inner, np.arange(0)]), minlength=rows) + _UNSEEN
        self.log_counts: Floats = np.log(counts / counts.sum()).astype(np.float32)
        """[V]: of each token by itself."""
        special = [one for one in getattr(backbone.text_input.tokenizer, "all_special_ids", []) if one < rows]
        self.log_counts[special] = _NEVER
        self._pairs = Counter(pair for text in texts for pair in pairwise(text.tolist()))
        self._firsts = Counter(token for text in texts for token in text[:-1].tolist())

    def log_of(self, tokens: Ints) -> float:
        """The logarithm of how likely a row of tokens is, by pairs where they are known."""
        total, ids = 0.0, tokens.tolist()
        for first, second in pairwise(ids):
            single = math.exp(max(float(self.log_counts[second]), -30.0))
            seen = self._firsts.get(first, 0)
            pairs = self._pairs.get((first, second), 0) / seen if seen else single
            total += math.log(_PAIRS * pairs + (1 - _PAIRS) * single)
        return total


def _around(backbone: Backbone) -> tuple[list[int], list[int]]:
    """What a tokenizer puts around every text."""
    tokens = backbone.text_input.read(_TRIED, 16)
    one, two = (row[mask].tolist() for row, mask in zip(tokens.ids, tokens.mask, strict=True))
    before = 0
    while before < len(one) - 1 and one[before] == two[before]:
        before += 1
    after = 0
    while after < len(one) - 1 - before and one[-1 - after] == two[-1 - after]:
        after += 1
    return one[:before], one[len(one) - after :]
