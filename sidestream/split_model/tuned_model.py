"""A whole model with the adapters of a split job in it: answers for those who have room for all layers.

Legend: K texts, N real tokens of all of them, C numbers in an answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sidestream.backbone.sampled import Bools, Ints
from sidestream.backbone.text_input import TextInput, Tokens
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.contract.errors import DecodeError
from sidestream.contract.lora import LoraSpec
from sidestream.contract.tasks import NO_TARGET, Task
from sidestream.contract.tensors import Floats
from sidestream.split_model.split_model import SplitModel


class TunedModel:
    """Answers with a backbone and adapters.

    Args:
        backbone: All layers of it.
        lora: The adapters' form.
        task: What was learnt.
        labels: How many labels there are.
        arrays: The adapters, and the head where the task has one. Layers without any stay as they are.

    Raises:
        BackboneError: the backbone cannot be split.
        DecodeError: the arrays are none of its adapters, or the head is missing.
    """

    def __init__(
        self, backbone: TorchBackbone, lora: LoraSpec, task: Task, labels: int, arrays: Mapping[str, Floats]
    ) -> None:
        self._backbone = backbone
        self.model = SplitModel(backbone, lora, task=task, labels=labels, seed=0)
        """With the adapters in it."""
        own = self.model.arrays()
        lacking = [name for name in own if name not in arrays and self.model.layer_of(name) is None]
        if lacking or not arrays.keys() <= own.keys():
            raise DecodeError("the weights are not all that this model's answers take")
        idle = {name: np.zeros_like(array) for name, array in own.items() if name not in arrays}
        self.model.load({**idle, **arrays})

    @property
    def text_input(self) -> TextInput:
        """The tokenizer."""
        return self._backbone.text_input

    def language_model(self, *, frozen: bool = False) -> TorchLanguageModel:
        """The decoder with the adapters in it, or as it was before anything was learnt."""
        found = self._backbone if frozen else self.model.view
        assert isinstance(found, TorchLanguageModel)
        return found

    def answers(self, tokens: Tokens) -> Floats:
        """[K, C]: logits, or numbers."""
        with torch.no_grad():
            found: Floats = self.model.whole(tokens).numpy()
        return found

    def judge(self, tokens: Tokens, targets: Ints) -> tuple[Floats, Bools]:
        """Of a language model: losses and hits of the vectors [N] whose target is not -100."""
        told = targets != NO_TARGET
        assert self.model.head is not None
        with torch.no_grad():
            states = self.model.whole(tokens)[torch.from_numpy(told)]
            losses, hits = self.model.head.judge(states, torch.from_numpy(targets[told]))
        return losses.numpy(), hits.numpy()
