"""A backbone that runs a text once and recalls its taps from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from sidestream.backbone.preprocessor import Prepared
from sidestream.backbone.text_input import Tokens
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.tensors import Floats


class RecallingBackbone(TorchBackbone):
    """The same weights as another backbone, which is not copied; tokenising and sampling are its own.

    Every token's activation is kept, as f16, and handed out from there, the first time too: so all ways to
    sample and quantise see the same.

    Args:
        inner: The other one.
        taps: The layers to keep; no others can be read.
    """

    def __init__(self, inner: TorchBackbone, taps: Iterable[int]) -> None:
        vars(self).update(vars(inner))
        self._kept = sorted(set(taps))
        self._known: dict[bytes, npt.NDArray[np.float16]] = {}  # by token ids: [B, T, d]

    def _run(self, tokens: Prepared, taps: Sequence[int], take: Callable[[Floats], None]) -> None:
        assert isinstance(tokens, Tokens)
        assert tokens.segments is None, "pairs are not recalled"
        ids, mask, _ = tokens
        keys = [row[real].tobytes() for row, real in zip(ids, mask, strict=True)]
        if fresh := [row for row, key in enumerate(keys) if key not in self._known]:
            states: list[Floats] = []
            super()._run(Tokens(ids[fresh], mask[fresh]), self._kept, lambda tap: states.append(tap.copy()))
            for place, row in enumerate(fresh):
                tapped = [state[place, mask[row]].astype(np.float16) for state in states]
                self._known[keys[row]] = np.stack(tapped)
        for tap in taps:
            number = self._kept.index(tap)
            padded = np.zeros((*mask.shape, self.width), np.float32)
            padded[mask] = np.concatenate([self._known[key][number] for key in keys])
            take(padded)
