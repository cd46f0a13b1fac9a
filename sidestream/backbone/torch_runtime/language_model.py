"""Language models that torch computes: decoders with their output head.

Legend: K texts, T tokens of the longest, B taps, M states, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from sidestream.backbone.language_model import LanguageModel
from sidestream.backbone.sampled import Bools, Ints
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.layer_stack import REMEDY, stacks_of, tensor_of, text_config
from sidestream.backbone.torch_runtime.trial import Given, explained, is_close, refusal
from sidestream.contract.errors import BackboneError, DecodeError
from sidestream.contract.plan import Precision
from sidestream.contract.tensors import Floats
from sidestream.side_network.output_head import OutputHead, find_head

_HEAD: Final = "head."


class TorchLanguageModel(TorchBackbone, LanguageModel):
    """A causal language model of transformers.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer.
        layers: Keep only the first so many layers; 0 for all. The head stays the same.
        name: For messages.
        precision: As for any backbone; the head is kept in f32 where that is int8.

    Raises:
        BackboneError: as for any backbone, or its head is of a kind that is not known, or it is no decoder.
    """

    _auto: ClassVar[Any] = AutoModelForCausalLM

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        layers: int = 0,
        name: str = "backbone",
        precision: Precision = "f32",
    ) -> None:
        model = model.float().eval().requires_grad_(False)
        self.head = _head_of(model, name)
        """From its last state to logits."""
        self.head_fingerprint = self.head.fingerprint()
        self.vocabulary = self.head.vocabulary
        _check_head(model, self.head, name)
        eos = getattr(model.generation_config, "eos_token_id", None)
        if eos is None:
            eos = tokenizer.eos_token_id
        self.ends: tuple[int, ...] = (
            tuple(eos) if isinstance(eos, list | tuple) else (eos,) if eos is not None else ()
        )
        super().__init__(model.base_model, tokenizer, layers=layers, name=name, precision=precision)
        if not self.is_decoder:
            raise BackboneError(f"{name}: its tokens see those after them; a language model needs a decoder")
        if precision == "bf16":
            for parameter in self.head.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)

    @property
    def layers(self) -> nn.ModuleList:
        """Those in use."""
        return self._stack.layers

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        known = set()
        for name, parameter in super().parameters():
            known.add(id(parameter))
            yield name, parameter
        for name, parameter in self.head.named_parameters():
            if id(parameter) not in known:
                yield f"{_HEAD}{name}", parameter

    def _is_head(self, name: str) -> bool:
        return name.startswith(_HEAD)

    def judge(self, states: Floats, targets: Ints) -> tuple[Floats, Bools]:
        losses, hits = self.head.judge(torch.from_numpy(states), torch.from_numpy(targets))
        return losses.numpy(), hits.numpy()

    def logits(self, states: Floats) -> Floats:
        with torch.inference_mode():
            found: Floats = self.head(torch.from_numpy(states)).numpy()
        return found

    def decoding(self, taps: Sequence[int]) -> TorchDecoding:
        return TorchDecoding(self, taps)

    def _try(self, given: Given) -> None:
        super()._try(given)
        tokens = given["input_ids"][0].tolist()
        state = self._every_state(given["input_ids"][:1], given["attention_mask"][:1].bool())[-1]
        decoding = self.decoding([self.depth])
        decoding.feed(tokens[:-2])
        for place in (-2, -1):
            (step,) = torch.from_numpy(decoding.feed([tokens[place]]))
            if not is_close(step, state[:, place]):
                raise refusal(self._model, self.name, "token by token it gives other states than at once")


class TorchDecoding:
    """One text as it grows; keys and values of what the model has seen are kept.

    Args:
        model: The model.
        taps: Layers to read.
    """

    def __init__(self, model: TorchLanguageModel, taps: Sequence[int]) -> None:
        self._model = model
        self._taps = taps
        self._cache = DynamicCache(config=text_config(model._model))
        self._seen = 0

    def feed(self, tokens: Sequence[int]) -> Floats:
        self._seen += len(tokens)
        read: list[Tensor] = []
        with self._model._lock, torch.inference_mode():
            self._model.read(
                torch.tensor([list(tokens)]),
                torch.ones(1, self._seen, dtype=torch.bool),
                self._taps,
                lambda tap: read.append(tap[0, -1:].float()),
                past_key_values=self._cache,
                use_cache=True,
            )
        taps: Floats = torch.stack(read).numpy()
        return taps


def _head_of(model: Any, name: str) -> OutputHead:
    """The model's own tensors, none of them copied."""
    tensors = dict(model.base_model.named_parameters())
    out = model.get_output_embeddings()
    if out is None:
        raise BackboneError(
            f"{name}: a {type(model).__name__} has no output head; use a causal language model"
        )
    tensors |= {"lm_head.weight": out.weight}
    if getattr(out, "bias", None) is not None:
        tensors |= {"lm_head.bias": out.bias}
    try:
        spec, names = find_head(text_config(model).to_dict(), tensors)
        return OutputHead(spec, {part: tensors[found] for part, found in names.items()})
    except DecodeError as exc:
        raise BackboneError(f"{name}: {exc}; {REMEDY}") from exc


def _check_head(model: Any, head: OutputHead, name: str) -> None:
    """See that the head answers as the model does: there may be more to it than its tensors tell."""
    states: list[Tensor] = []
    hooks = [
        stack[-1].register_forward_hook(lambda module, given, out: states.append(_state(out)))
        for stack in stacks_of(model.base_model, name)
    ]
    ids = torch.arange(4)[None] % head.vocabulary
    try:
        with explained(model, name), torch.inference_mode():
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            found = [head(state) for state in states if state.shape[-1] == head.width]
    finally:
        for hook in hooks:
            hook.remove()
    if not any(torch.allclose(one, expected, rtol=1e-3, atol=1e-3) for one in found):
        raise BackboneError(
            f"{name}: a {type(model).__name__} has an output head of a kind that is not known; {REMEDY}"
        )


def _state(out: Any) -> Tensor:
    found = tensor_of(out)
    return torch.empty(0) if found is None else found
