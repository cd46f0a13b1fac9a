"""The whole frozen model with LoRA in every layer, for those who have room for it; above all the trainer.

It takes up any device's states at that device's cut: one model serves them all.

Legend: K texts, T tokens of the longest, N real tokens of all of them, d hidden size, C numbers in an answer,
V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn

from sidestream.backbone.sampled import Ints
from sidestream.backbone.text_input import Tokens
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.contract.errors import BackboneError, ConfigError
from sidestream.contract.lora import LoraSpec
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.tensors import Floats
from sidestream.side_network.output_head import OutputHead
from sidestream.split_model.adapters import (
    Adapters,
    Shell,
    check_arrays,
    check_precision,
    lora_config,
    refusing,
    to_arrays,
)
from sidestream.split_model.classifier import HEAD, Classifier, classifier_over
from sidestream.split_model.exported import write_export
from sidestream.split_model.skipping import starting_at
from sidestream.split_model.trial import check_cuts, check_gradients, watch


class SplitModel:
    """A frozen model with LoRA and an output head. Not for two threads at once.

    The backbone itself stays as it is, and may be shared. A language model's head is its own, and frozen;
    else the head is one linear map, which is trained and starts at zero.

    Args:
        backbone: With all its layers; in f32 or bf16. For a language model, loaded as one.
        lora: Which adapters.
        task: Decides what an answer is.
        labels: How many labels the job has.
        seed: Decides the adapters' initial values.

    Raises:
        ConfigError: the task is none that a split model learns.
        BackboneError: the backbone is kept in int8, or adapters cannot be had in it, or a trial pass shows
            that it cannot be cut exactly.
    """

    def __init__(
        self, backbone: TorchBackbone, lora: LoraSpec, *, task: Task, labels: int, seed: int
    ) -> None:
        check_precision(backbone)
        _check_task(backbone, task)
        self._backbone = backbone
        self._task = task
        self._view = backbone.twin()
        self.head: OutputHead | None = getattr(backbone, "head", None) if TASKS[task].generates else None
        """A language model's, frozen: from last states [M, d] to logits [M, V], in chunks if wanted."""
        self._classifier: Classifier | None = None
        more: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        if self.head is None:
            with refusing(backbone):
                self._classifier = classifier_over(self._view, TASKS[task].outputs(labels))
            more = {"modules_to_save": [HEAD]}
        outer = self._classifier or Shell(self._view.model)
        config = lora_config(backbone, lora, every=True, base_model_name_or_path=backbone.name, **more)
        self._adapters = Adapters(self._view, lambda: self._wrap(outer, config), seed=seed)
        self.parameters: dict[str, nn.Parameter] = self._adapters.parameters | self._head_parameters()
        """What is trained, by name: adapters layer by layer, then the head. They stay the same objects."""
        with refusing(backbone):
            self._try()

    @property
    def view(self) -> TorchBackbone:
        """The model with the adapters in it, as a backbone of its own."""
        return self._view

    @property
    def depth(self) -> int:
        """Layers."""
        return self._backbone.depth

    @property
    def width(self) -> int:
        """D."""
        return self._backbone.width

    def layer_of(self, name: str) -> int | None:
        """The layer that a parameter is in, from 0; None for the head's."""
        return None if name.startswith(f"{HEAD}.") else self._adapters.layer_of(name)

    def fingerprint(self, cut: int) -> str:
        """The fingerprint of this model loaded, in the same way, with its first ``cut`` layers only."""
        return self._backbone.fingerprint_of_first(cut)

    def answers(self, cut: int, states: Tensor, lengths: Ints) -> Tensor:
        """Run the layers from ``cut`` on, and the head.

        Args:
            cut: Layers that were computed elsewhere, 0 to depth - 1.
            states: [N, d] float32 of the last of them, row by row; if it wants a gradient, it gets one.
            lengths: [K]: tokens of each row.

        Returns:
            [K, C]; in a language model the last layer's states [N, d], for :attr:`head`.
        """
        mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
        padded = states.new_zeros(*mask.shape, states.shape[1]).masked_scatter(mask[:, :, None], states)
        return self._answers(self._upper(cut, padded, mask), mask)

    def whole(self, tokens: Tokens) -> Tensor:
        """The same answers from tokens, by all layers."""
        ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
        more = {} if tokens.segments is None else {"token_type_ids": torch.from_numpy(tokens.segments)}
        return self._answers(self._run(ids, mask, **more), mask)

    def arrays(self) -> dict[str, Floats]:
        """Every parameter by name, as float32 arrays that share no memory with the model."""
        return to_arrays(self.parameters)

    def load(self, arrays: Mapping[str, Floats]) -> None:
        """Set every parameter, in place.

        Raises:
            DecodeError: names or shapes are not exactly these, or a value is not finite.
        """
        check_arrays(arrays, self.parameters)
        with torch.no_grad():
            for name, array in arrays.items():
                self.parameters[name].copy_(torch.from_numpy(array))

    def export(self, labels: Sequence[str] = ()) -> dict[str, bytes]:
        """The adapters as files that peft reads, and what :mod:`.tuned` must know to build the rest.

        Args:
            labels: The job's, in index order.
        """
        return write_export(self._peft, self._backbone, self._task, labels)

    def _wrap(self, outer: nn.Module, config: Any) -> None:
        self._peft = peft.PeftModel(outer, config, low_cpu_mem_usage=True)

    def _head_parameters(self) -> dict[str, nn.Parameter]:
        if self._classifier is None:
            return {}
        wrapped: Any = self._classifier.head  # by peft, which keeps the original beside what is trained
        (trained,) = wrapped.modules_to_save.values()
        return {f"{HEAD}.{name}": one for name, one in trained.named_parameters()}

    def _upper(self, cut: int, states: Tensor, mask: Tensor) -> Tensor:
        """Padded states [K, T, d] after ``cut`` layers and mask [K, T] -> the last ones."""
        assert 0 <= cut < self.depth, f"nothing is left to do after {cut} of {self.depth} layers"
        ids = torch.full(mask.shape, self._token)
        with starting_at(self._view.stack.layers, cut, states.to(self._dtype), self._parts):
            return self._run(ids, mask)

    def _run(self, ids: Tensor, mask: Tensor, **more: Tensor) -> Tensor:
        """[K, T] of ids -> last states [K, T, d]: the model's own; in a language model, the last layer's."""
        if self._classifier is not None:
            found = self._view.model(input_ids=ids, attention_mask=mask.long(), **more)
            return found.last_hidden_state  # type: ignore[no-any-return]
        read: list[Tensor] = []
        self._view.read(ids, mask, [self.depth], read.append, **more)
        return read[0]

    def _answers(self, states: Tensor, mask: Tensor) -> Tensor:
        if self._classifier is None:
            return states[mask].float()
        return self._classifier.answers(states, mask)

    def _try(self) -> None:
        tokens = self._view.trial_tokens()
        self._token = int(tokens.ids[0, 0])
        """Stands where tokens were that others have looked at."""
        seen = watch(self._view, tokens, self._run)
        self._parts, self._dtype = seen.parts, seen.states[0].dtype
        check_cuts(self._view, seen, self._upper)
        cut = min(1, self.depth - 1)
        adapters = self._adapters
        above = {name: one for name, one in adapters.parameters.items() if adapters.layer_of(name) >= cut}
        check_gradients(self._view, seen, cut, self._upper, above)


def _check_task(backbone: TorchBackbone, task: Task) -> None:
    if TASKS[task].generates and not isinstance(backbone, TorchLanguageModel):
        raise BackboneError(f"{backbone.name}: was loaded without its output head")
    if TASKS[task].per_vector and not TASKS[task].generates:
        raise ConfigError(
            "task", f"{task.value} is not learnt by a split model; use a method that does not split"
        )
