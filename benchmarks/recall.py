"""A backbone that runs a text once and recalls its taps from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.backbone.torch_runtime.backbone import Backbone


class RecallingBackbone(Backbone):
    """The same weights as another backbone, which is not copied; tokenising and sampling are its own.

    Every token's activation is kept, as f16, and handed out from there, the first time too: so all ways to
    sample and quantise see the same.

    Args:
        inner: The other one.
        taps: The layers to keep; no others can be read.
    """

    def __init__(self, inner: Backbone, taps: Iterable[int]) -> None:
        vars(self).update(vars(inner))
        self._kept = sorted(set(taps))
        self._known: dict[bytes, Tensor] = {}  # by token ids: [B, T, d]

    def _read(
        self,
        ids: Tensor,
        mask: Tensor,
        taps: Sequence[int],
        take: Callable[[Tensor], None],
        **options: Any,
    ) -> None:
        assert not options, "pairs are not recalled"
        keys = [row[real].numpy().tobytes() for row, real in zip(ids, mask, strict=True)]
        if fresh := [row for row, key in enumerate(keys) if key not in self._known]:
            states: list[Tensor] = []
            super()._read(ids[fresh], mask[fresh], self._kept, states.append)
            for place, row in enumerate(fresh):
                tapped = [state[place, mask[row]].half() for state in states]
                self._known[keys[row]] = torch.stack(tapped)
        for tap in taps:
            number = self._kept.index(tap)
            rows = [self._known[key][number] for key in keys]
            take(nn.utils.rnn.pad_sequence(rows, batch_first=True))
