"""The halves of a split model as a device uses them, and where they come from. Torch is imported only then.

Legend: K texts, N real tokens of all of them, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.language_model import LanguageModel
from sidestream.backbone.sampled import Bools, Ints
from sidestream.backbone.text_input import TextInput, Tokens
from sidestream.contract.errors import BackboneError
from sidestream.contract.lora import LoraSpec
from sidestream.contract.plan import RoundPlan
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats


class Pass(Protocol):
    """One forward pass that waits for its gradient."""

    states: Floats
    """[N, d]."""
    lengths: Ints
    """[K]: tokens of each row."""

    def backward(self, gradient: Floats, rows: Sequence[int] | None = None) -> dict[str, Floats]:
        """See :meth:`sidestream.split_model.lower_half.LowerPass.backward`."""


class Lower(Protocol):
    """The device's half: see :class:`sidestream.split_model.lower_half.LowerHalf`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters' tensors."""

    def load(self, arrays: Mapping[str, Floats]) -> None:
        """Take other adapters."""

    def arrays(self) -> dict[str, Floats]:
        """The adapters by name."""

    def forward(self, tokens: Tokens) -> Pass:
        """Run texts through the layers."""


class Steps(Protocol):
    """A device's own optimiser: see :class:`sidestream.split_model.local_steps.LocalSteps`."""

    def begin(self) -> None:
        """A round begins: what was before is forgotten."""

    def step(self, gradients: Mapping[str, Floats], rate: float) -> None:
        """Move the adapters."""


class Whole(Protocol):
    """All layers, for those who have room for them."""

    def judge(self, tokens: Tokens, targets: Ints) -> tuple[Floats, Bools]:
        """Of a language model: losses and hits of the vectors [N] whose target is not -100."""

    def answers(self, tokens: Tokens) -> Floats:
        """[K, C]: logits, or numbers."""

    @property
    def text_input(self) -> TextInput:
        """The tokenizer."""

    def language_model(self, *, frozen: bool = False) -> LanguageModel:
        """The decoder with the adapters in it, or as it was before anything was learnt."""


def lower_half(backbone: Backbone, lora: LoraSpec) -> Lower:
    """The device's half of a backbone that was loaded with its layers only.

    Raises:
        BackboneError: its runtime computes no gradients, or it cannot be cut there.
    """
    from sidestream.backbone.torch_runtime.backbone import TorchBackbone  # seconds: torch and transformers
    from sidestream.split_model.lower_half import LowerHalf

    if not isinstance(backbone, TorchBackbone):
        raise BackboneError(
            f"{backbone.name}: a split job needs gradients, which only torch computes: set runtime = "
            '"torch", and name the model itself, not an exported folder'
        )
    backbone.to_processor()
    return LowerHalf(backbone, lora)


def local_steps(lower: Lower, plan: RoundPlan) -> Steps:
    """A device's own optimiser of its adapters."""
    from sidestream.split_model.local_steps import LocalSteps
    from sidestream.split_model.lower_half import LowerHalf

    assert isinstance(lower, LowerHalf)
    return LocalSteps(lower, plan)


def whole_model(
    backbone: Backbone, lora: LoraSpec, task: Task, labels: int, arrays: Mapping[str, Floats]
) -> Whole:
    """All of a model with its adapters; those that are not given stay without effect.

    Raises:
        BackboneError: it cannot be had.
        DecodeError: the adapters are none of its.
    """
    from sidestream.backbone.torch_runtime.backbone import TorchBackbone
    from sidestream.split_model.tuned_model import TunedModel

    if not isinstance(backbone, TorchBackbone):
        raise BackboneError(f"{backbone.name}: a split job's weights need torch to answer; set runtime")
    backbone.to_processor()
    return TunedModel(backbone, lora, task, labels, arrays)
