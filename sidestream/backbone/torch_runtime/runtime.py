"""torch with transformers, as :mod:`sidestream.backbone.runtimes` knows it."""

from __future__ import annotations

import torch

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.backbone.torch_runtime.vision import TorchVisionBackbone
from sidestream.contract.plan import Precision
from sidestream.contract.tasks import TASKS, Modality, Task


class TorchRuntime:
    """Runs any encoder, decoder or vision transformer of transformers that can be tapped."""

    def load(self, reference: str, layers: int, precision: Precision, task: Task) -> Backbone:
        if TASKS[task].modality is Modality.IMAGE:
            return TorchVisionBackbone.load(reference, layers, precision)
        kind = TorchLanguageModel if TASKS[task].generates else TorchBackbone
        return kind.load(reference, layers, precision)

    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)
