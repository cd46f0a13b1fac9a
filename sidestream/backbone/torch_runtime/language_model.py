"""A frozen decoder with its output head: what a language-model job's devices forward and generate with.

Legend: K windows, T tokens of the longest, B taps, N sampled tokens a window, d hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from sidestream.backbone.taps import Sampled, TargetSampler, seeds_of
from sidestream.backbone.torch_runtime.backbone import Backbone, shared, tell_loaded
from sidestream.backbone.torch_runtime.layer_stack import REMEDY, stacks_of, tensor_of, text_config
from sidestream.backbone.torch_runtime.saved_model import read_model
from sidestream.backbone.torch_runtime.trial import Given, explained, is_close, refusal
from sidestream.backbone.windows import Window, cut
from sidestream.contract.errors import BackboneError, DecodeError
from sidestream.contract.plan import Precision
from sidestream.contract.sampling import Sampling
from sidestream.contract.tasks import NO_TARGET
from sidestream.side_network.output_head import OutputHead, find_head


class LanguageModel(Backbone):
    """A frozen decoder, its tokenizer and its head.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer.
        layers: Keep only the first so many layers; 0 for all. The head stays the same.
        name: For messages.
        precision: As for any backbone; the head is kept in f32 where that is int8.

    Raises:
        BackboneError: as for any backbone, or its head is of a kind that is not known, or it is no decoder.
    """

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
        """What the plan's must be."""
        _check_head(model, self.head, name)
        eos = getattr(model.generation_config, "eos_token_id", None)
        if eos is None:
            eos = tokenizer.eos_token_id
        self.ends: tuple[int, ...] = (
            tuple(eos) if isinstance(eos, list | tuple) else (eos,) if eos is not None else ()
        )
        """Tokens that end a text."""
        super().__init__(model.base_model, tokenizer, layers=layers, name=name, precision=precision)
        if not self.is_decoder:
            raise BackboneError(f"{name}: its tokens see those after them; a language model needs a decoder")
        if precision == "bf16":
            for parameter in self.head.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)

    @property
    def longest(self) -> int:
        """Tokens that it can see at once."""
        return self._longest

    @property
    def layers(self) -> nn.ModuleList:
        """Those in use."""
        return self._layers

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        known = set()
        for name, parameter in super().parameters():
            known.add(id(parameter))
            yield name, parameter
        for name, parameter in self.head.named_parameters():
            if id(parameter) not in known:
                yield f"head.{name}", parameter

    def check_head(self, fingerprint: str) -> None:
        """Refuse to be used where another head is wanted; empty where the trainer has none yet.

        Raises:
            BackboneError: saying what to do.
        """
        if fingerprint and self.head_fingerprint != fingerprint:
            raise BackboneError(
                f"this device's output head ({self.head_fingerprint[:8]}…, from {self.name}) is not the one "
                f"that the trainer learns with ({fingerprint[:8]}…): give both the same model"
            )

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, with those that the tokenizer puts around one."""
        return self._within(self._tokenizer(text, verbose=False)["input_ids"])

    def text(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without special ones."""
        text: str = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _within(self, tokens: Sequence[int]) -> list[int]:
        """Special tokens that the model has none for become its last one."""
        return [min(token, self.head.vocabulary - 1) for token in tokens]

    def windows(self, text: str, completion: str | None, max_tokens: int) -> list[Window]:
        """A sample as the model takes it: a plain text, or a prompt and the completion that ends it."""
        longest = min(max_tokens, self._longest)
        if completion is None:
            return cut([], self.tokens(text), longest)
        answer = self._tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        answer = self._within(answer)
        return cut(self.tokens(text), [*answer, *self.ends[:1]], longest)

    def forward_windows(
        self,
        windows: Sequence[Window],
        taps: Sequence[int],
        choose: Callable[[npt.NDArray[np.int64]], Sampling],
    ) -> Sampled:
        """Run K windows through the layers; of the tokens with a target, sample each tap as it is reached.

        Args:
            windows: Each with one target at least.
            taps: Layers to read, ascending; the last one is the model's last in use.
            choose: Given how many targets each window has [K], says by which policy to sample.
        """
        with self._lock, torch.inference_mode():
            started = time.perf_counter()
            ids = _padded([window.inputs for window in windows], 0)  # under the mask, never looked at
            targets = _padded([window.targets for window in windows], NO_TARGET)
            lengths = torch.tensor([len(window.inputs) for window in windows])
            mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
            policy = choose((targets != NO_TARGET).sum(dim=1).numpy())
            seeds = seeds_of([" ".join(map(str, window.inputs)) for window in windows])
            sampler = TargetSampler(policy, targets, seeds, lambda s, t: self.head.judge(s, t)[0])
            self._read(ids, mask, taps, sampler.take)
            return replace(sampler.sampled(), seconds=time.perf_counter() - started)

    def _try(self, given: Given) -> None:
        super()._try(given)
        tokens = given["input_ids"][0].tolist()
        state = self._every_state(given["input_ids"][:1], given["attention_mask"][:1].bool())[-1]
        decoding = Decoding(self, [self.depth])
        decoding.feed(tokens[:-2])
        steps = [decoding.feed(tokens[-2:-1]), decoding.feed(tokens[-1:])]
        if not all(
            is_close(step[0, :, 0], state[:, place]) for step, place in zip(steps, (-2, -1), strict=True)
        ):
            raise refusal(self._model, self.name, "token by token it gives other states than at once")


class Decoding:
    """One text as it grows: what the model has seen so far is kept (keys and values), and not computed again.

    Args:
        model: The model.
        taps: Layers to read.
    """

    def __init__(self, model: LanguageModel, taps: Sequence[int]) -> None:
        self._model = model
        self._taps = taps
        self._cache = DynamicCache(config=text_config(model._model))
        self._seen = 0

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Show it the next tokens; return the taps [B, 1, 1, d] of the last one."""
        self._seen += len(tokens)
        read: list[Tensor] = []
        with self._model._lock, torch.inference_mode():
            self._model._read(
                torch.tensor([list(tokens)]),
                torch.ones(1, self._seen, dtype=torch.bool),
                self._taps,
                lambda tap: read.append(tap[:, -1:].float()),
                past_key_values=self._cache,
                use_cache=True,
            )
        return torch.stack(read)


def load_language_model(reference: str, layers: int = 0, precision: Precision = "f32") -> LanguageModel:
    """As :func:`sidestream.backbone.torch_runtime.backbone.load_backbone`, with the output head.

    Raises:
        BackboneError: it cannot be found or loaded, or is no causal language model.
    """
    started = time.perf_counter()
    model, tokenizer = read_model(reference, AutoModelForCausalLM)
    found = LanguageModel(model, tokenizer, layers=layers, name=reference, precision=precision)
    tell_loaded(found, precision, time.perf_counter() - started)
    return found


def shared_language_model(reference: str, layers: int = 0, precision: Precision = "f32") -> LanguageModel:
    """As :func:`load_language_model`, but loaded once in this process."""
    return shared(load_language_model, reference, layers, precision)


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


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
