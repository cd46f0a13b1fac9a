"""A backbone with one linear map over its pooled states, as peft and people's own tools take a model.

Legend: K texts, T tokens, d hidden size, C numbers in an answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sidestream.backbone.torch_runtime.backbone import TorchBackbone

HEAD = "head"
"""The map's name in the model."""


class Answer(NamedTuple):
    """What a model says."""

    logits: Tensor
    """[K, C]."""


class Classifier(nn.Module):
    """Mean over the real tokens, or the last of them in a decoder; then one linear map, zero at first.

    It has no ``config``, as :class:`.adapters.Shell`.

    Args:
        backbone: A model of transformers, whole.
        width: d of its last states.
        outputs: C.
        is_decoder: Whether the last token carries the sentence.
    """

    def __init__(self, backbone: nn.Module, width: int, outputs: int, *, is_decoder: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.utils.skip_init(nn.Linear, width, outputs)  # type: ignore[no-untyped-call]
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self._is_decoder = is_decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Answer:
        """[K, T] of token ids, and which are real: what a tokenizer of transformers returns."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {name: value for name, value in more.items() if name == "token_type_ids"}
        states = self.backbone(input_ids=input_ids, attention_mask=mask, **given).last_hidden_state
        return Answer(self.answers(states, mask.bool()))

    def answers(self, states: Tensor, mask: Tensor) -> Tensor:
        """Last states [K, T, d] and mask [K, T] -> [K, C]."""
        return self.head(self._pooled(states.float(), mask))  # type: ignore[no-any-return]

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        if self._is_decoder:
            places = torch.arange(mask.shape[1]) * mask
            return states[torch.arange(len(states)), places.argmax(dim=1)]
        real = mask[:, :, None]
        return states.masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)


def classifier_over(backbone: TorchBackbone, outputs: int) -> Classifier:
    """For C ``outputs``. Some models end narrower than their layers are, so one token goes through it."""
    token = torch.from_numpy(backbone.trial_tokens().ids[:1, :1])
    with torch.no_grad():
        last = backbone.model(input_ids=token, attention_mask=torch.ones_like(token)).last_hidden_state
    return Classifier(backbone.model, last.shape[-1], outputs, is_decoder=backbone.is_decoder)
