"""torch with transformers, as :mod:`sidestream.backbone.runtimes` knows it."""

from __future__ import annotations

import torch

from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.contract.plan import Precision


class TorchRuntime:
    """Runs any encoder or decoder of transformers that can be tapped."""

    def load(self, reference: str, layers: int, precision: Precision, *, with_head: bool) -> TorchBackbone:
        kind = TorchLanguageModel if with_head else TorchBackbone
        return kind.load(reference, layers, precision)

    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)
