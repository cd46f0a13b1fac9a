"""A language model's output head: from its last layer's states to a logit for every token it knows.

Frozen, and the same on both ends: a device builds it from its loaded model, the trainer from a few tensors of
the model's file, found by name. With E the output embedding::

    logits = E · project(norm(state)) + bias,   perhaps capped: c · tanh(logits / c)

Each part but E may be missing. The families differ in the norm: LayerNorm (GPT-2, OPT), RMSNorm (Llama,
Qwen), RMSNorm that stores its weight less one (Gemma), or none (OPT-350M).

Legend: M states, d hidden size, e embedding size, V tokens in the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sidestream.contract.errors import DecodeError
from sidestream.contract.wire import prepared

Norm = Literal["none", "layer", "rms", "rms-plus-one"]
PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "norm_weight": (
        *("ln_f.weight", "norm.weight", "final_layer_norm.weight", "final_layernorm.weight"),
        *("norm_f.weight", "final_norm.weight"),
    ),
    "norm_bias": ("ln_f.bias", "norm.bias", "final_layer_norm.bias", "final_layernorm.bias"),
    "project": ("project_out.weight",),
    "embedding": (
        *("lm_head.weight", "embed_out.weight", "wte.weight", "embed_tokens.weight"),
        *("word_embeddings.weight", "embed_in.weight"),
    ),
    "bias": ("lm_head.bias",),
}
"""The parts, and how models name them, in order of preference. Names of single layers hold a number."""
_CHUNK_VALUES: Final = 2**23
_DEFAULT_EPS: Final = 1e-5


@prepared
class HeadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the tensors do not tell."""

    norm: Norm
    """The kind of norm."""
    eps: float = _DEFAULT_EPS
    """Its epsilon."""
    softcap: float = 0.0
    """Logits are capped to this magnitude; 0: they are not."""


class OutputHead(nn.Module):
    """A frozen head.

    Args:
        spec: What kind.
        tensors: By part's name (:data:`PARTS`); parameters are kept as they are, other tensors not copied.

    Raises:
        DecodeError: if a part is missing, or their shapes do not go together.
    """

    def __init__(self, spec: HeadSpec, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        if "embedding" not in tensors or (spec.norm != "none") != ("norm_weight" in tensors):
            raise DecodeError(f"no output head: there are only {', '.join(sorted(tensors)) or 'no parts'}")
        for part in PARTS:
            self.register_parameter(part, _frozen(tensors.get(part)))
        self._check()

    embedding: nn.Parameter
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None
    project: nn.Parameter | None
    bias: nn.Parameter | None

    @property
    def width(self) -> int:
        """D."""
        return int(self.embedding.shape[1] if self.project is None else self.project.shape[1])

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.embedding.shape[0])

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(one.numel() * one.element_size() for one in self.parameters())

    def forward(self, states: Tensor) -> Tensor:
        """[…, d] float32 -> [… , V] float32."""
        hidden = self._normed(states)
        if self.project is not None:
            hidden = functional.linear(hidden.to(self.project.dtype), self.project)
        logits = functional.linear(hidden.to(self.embedding.dtype), self.embedding, self.bias).float()
        if self.spec.softcap:
            logits = torch.tanh(logits / self.spec.softcap) * self.spec.softcap
        return logits

    def chunks(self, states: Tensor) -> Iterator[slice]:
        """Runs of M states whose logits may be in memory together."""
        step = max(1, _CHUNK_VALUES // self.vocabulary)
        return (slice(start, start + step) for start in range(0, len(states), step))

    def judge(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[M, d] and [M] -> [M] losses in nats, and [M] whether the likeliest token is the target."""
        losses, hits = torch.empty(len(states)), torch.empty(len(states), dtype=torch.bool)
        with torch.inference_mode():
            for part in self.chunks(states):
                logits = self(states[part])
                losses[part] = functional.cross_entropy(logits, targets[part], reduction="none")
                hits[part] = logits.argmax(dim=1) == targets[part]
        return losses, hits

    def fingerprint(self) -> str:
        """32 hex digits: equal heads, equal fingerprint, whatever precision they are kept in on disk."""
        total = hashlib.blake2b(msgspec.json.encode(self.spec), digest_size=16, person=b"sidestream-head")
        for name, parameter in sorted(self.named_parameters()):
            array = parameter.detach().float().cpu().numpy().astype("<f4", copy=False)
            total.update(f"{name}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).reshape(-1).data)
        return total.hexdigest()

    def _normed(self, states: Tensor) -> Tensor:
        kind, weight = self.spec.norm, self.norm_weight
        if kind == "none" or weight is None:
            return states
        if kind == "layer":
            bias = None if self.norm_bias is None else self.norm_bias.float()
            return functional.layer_norm(states, weight.shape, weight.float(), bias, self.spec.eps)
        hidden = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.spec.eps)
        return hidden * (1.0 + weight.float()) if kind == "rms-plus-one" else weight.float() * hidden

    def _check(self) -> None:
        wanted: dict[str, tuple[int, ...]] = {
            "norm_weight": (self.width,),
            "norm_bias": (self.width,),
            "project": (self.embedding.shape[-1], self.width),
            "bias": (self.vocabulary,),
        }
        if self.embedding.dim() != 2:
            raise DecodeError("no output head: the embedding is no matrix")
        for part, shape in wanted.items():
            found = getattr(self, part)
            if found is not None and tuple(found.shape) != shape:
                raise DecodeError(f"no output head: its {part} has shape {tuple(found.shape)}, not {shape}")


def find_head(config: Mapping[str, Any], names: Iterable[str]) -> tuple[HeadSpec, dict[str, str]]:
    """Which of a model's tensors make up its head, by their names and its configuration.

    Args:
        config: The model's ``config.json``, or what it says of the text model.
        names: Of every tensor in the model.

    Returns:
        What kind of head it is, and the tensors' names by part.

    Raises:
        DecodeError: if there is nothing but an embedding, as in an encoder.
    """
    outside = [name for name in names if not any(piece.isdigit() for piece in name.split("."))]
    found: dict[str, str] = {}
    for part, endings in PARTS.items():
        matches = (name for ending in endings for name in outside if f".{name}".endswith(f".{ending}"))
        if (name := next(matches, None)) is not None:
            found[part] = name
    if "norm_weight" not in found and "project" not in found:
        raise DecodeError("no output head: nothing stands between its last layer and an embedding")
    return _spec(config, "norm_weight" in found), found


def _spec(config: Mapping[str, Any], has_norm: bool) -> HeadSpec:
    norm: Norm = "none"
    if has_norm and "rms_norm_eps" not in config:
        norm = "layer"
    elif has_norm:
        norm = "rms-plus-one" if str(config.get("model_type", "")).startswith("gemma") else "rms"
    eps = next(
        (
            float(config[name])
            for name in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
            if config.get(name) is not None
        ),
        _DEFAULT_EPS,
    )
    return HeadSpec(norm=norm, eps=eps, softcap=float(config.get("final_logit_softcapping") or 0.0))


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None:
        return None
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
