"""A backbone that is trained: mean of the last layer's tokens, a linear head, LoRA or all weights.

What the fleet's devices do not do; for the methods that Sidestream is compared with.

Legend: K texts, T tokens, d hidden size, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.lora import add_lora
from sidestream.backbone.torch_runtime.backbone import TorchBackbone


class Classifier(nn.Module):
    """Trains a loaded backbone's own model, tokenised as the agent does it.

    Args:
        backbone: Loaded for this purpose; its weights are changed.
        labels: C.
        max_tokens: Longer texts are cut.
    """

    def __init__(self, backbone: TorchBackbone, labels: int, max_tokens: int = 128) -> None:
        super().__init__()
        self._backbone = backbone
        self._max_tokens = max_tokens
        self.model = backbone._model
        for module in self.model.modules():  # OPT-350M maps back to the width of its embeddings
            if getattr(module, "project_out", None) is not None:
                setattr(module, "project_out", None)  # noqa: B010
        self.head = nn.Linear(backbone.width, labels)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Logits [K, C]."""
        hidden, mask = self.hidden(texts)
        real = mask[..., None].to(hidden.dtype)
        logits: Tensor = self.head((hidden * real).sum(dim=1) / real.sum(dim=1))
        return logits

    def hidden(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The last layer [K, T, d] and which tokens are real [K, T]."""
        tokens = self._backbone.text_input.read(texts, self._max_tokens)
        ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return hidden, mask

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def with_lora(classifier: Classifier) -> Classifier:
    """Freeze the backbone and train LoRA on attention's queries and values, beside the head.

    Raises:
        ConfigError: as :func:`benchmarks.lora.add_lora`.
    """
    add_lora(classifier.model)
    return classifier


def with_all(classifier: Classifier) -> Classifier:
    """Train every weight."""
    classifier.model.requires_grad_(True)
    return classifier


def loss_of(classifier: Classifier, texts: Sequence[str], targets: Sequence[int]) -> Tensor:
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(classifier(texts), torch.tensor(targets))
