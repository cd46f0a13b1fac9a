"""torch with transformers, as :mod:`sidestream.backbone.runtimes` knows it."""

from __future__ import annotations

import torch

from sidestream.accelerator.torch_device import HERE, choose
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.backbone.torch_runtime.vision import TorchVisionBackbone
from sidestream.contract.plan import Precision
from sidestream.contract.tasks import TASKS, Modality, Task


class TorchRuntime:
    """Runs any encoder, decoder or vision transformer of transformers that can be tapped."""

    def __init__(self) -> None:
        self._placement = HERE

    def set_device(self, wanted: str) -> None:
        """For what is loaded from now on; language models stay on the processor."""
        self._placement = choose(wanted)

    def load(self, reference: str, layers: int, precision: Precision, task: Task) -> Backbone:
        if TASKS[task].modality is Modality.IMAGE:
            vision = TorchVisionBackbone.load(reference, layers, precision)
            vision.place(self._placement)
            return vision
        if TASKS[task].generates:
            return TorchLanguageModel.load(reference, layers, precision)
        found = TorchBackbone.load(reference, layers, precision)
        found.place(self._placement)
        return found

    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)
