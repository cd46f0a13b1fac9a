"""The frozen transformer: located, loaded, cut to its first layers, fingerprinted, tapped.

This file and :mod:`edge_agent.language_model` alone import transformers. Nothing is trained and no gradient
is ever computed: every parameter is frozen and every pass runs in inference mode. A backbone may be kept in
bf16 or int8, which saves memory. Its fingerprint is taken before that, from the weights as they were loaded,
so that devices of one job may differ in precision.

Legend: K texts, T tokens of the longest, B taps, d hidden size.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from contract.errors import BackboneError
from contract.plan import Precision
from contract.sampling import EVERY_TOKEN, Sampling
from edge_agent.samples import Text
from edge_agent.taps import Sampled, TokenSampler, Words, seeds_of, word_numbers
from host.model_folder import locate

log = logging.getLogger(__name__)
_PROBE = "Ünïcode, CamelCase and don't: 3.14 * 2,000 €; 中文 عربى 🙂\tend\n"


class _Done(Exception):  # noqa: N818  (a message to ourselves: all taps are read)
    """Ends a forward pass after the last tapped layer."""


class Backbone:
    """A frozen transformer and its tokenizer. Safe to share between threads: passes take turns.

    Args:
        model: Any encoder or decoder of transformers, without a head.
        tokenizer: Its tokenizer.
        layers: Keep only the first so many layers; 0 for all.
        name: For messages.
        precision: How to keep it: as f32, as bf16, or with its linear layers quantised dynamically to int8.

    Raises:
        BackboneError: the model has no stack of layers that can be tapped, or fewer than ``layers``, or it
            cannot be kept in ``precision``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        layers: int = 0,
        name: str = "backbone",
        precision: Precision = "f32",
    ) -> None:
        self.name = name
        self._model = model.float().eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._layers = _truncate(self._model, layers, name)
        self._lock = threading.Lock()
        self._longest = _longest_input(self._model, tokenizer)
        config = text_config(self._model)
        self.width = int(config.hidden_size)
        """d."""
        self.depth = len(self._layers)
        """Layers in use."""
        self.is_decoder = not self._sees_ahead()
        """Whether a token only sees those before it, so that the last one carries the sentence."""
        self.fingerprint = _fingerprint(self.parameters(), tokenizer)
        """32 hex digits: equal weights and tokenizer, equal fingerprint, on every machine and in every
        precision."""
        self._convert(precision)

    def forward(
        self,
        texts: Sequence[Text],
        taps: Sequence[int],
        max_tokens: int,
        choose: Callable[[npt.NDArray[np.int64]], Sampling] = lambda lengths: EVERY_TOKEN,
        *,
        words: bool = False,
    ) -> Sampled:
        """Run ``texts`` through the layers up to the last tapped one, and sample each tap as it is reached.

        Args:
            texts: K of them.
            taps: Layers to read, 1 = the first layer's output, ascending, at most :attr:`depth`.
            max_tokens: Longer texts are cut, also to what the model can take.
            choose: Given the texts' lengths in tokens [K], says by which policy to sample.
            words: Take a vector for every word, and not for every token; lengths are then in words. Pairs of
                texts have no words.

        Raises:
            BackboneError: ``words`` are asked for, and the tokenizer does not tell where they are.
        """
        with self._lock, torch.inference_mode():
            started = time.perf_counter()
            if words:
                texts = [" ".join(text.split()) for text in texts if isinstance(text, str)]
            encoded = self._encode(texts, min(max_tokens, self._longest), offsets=words)
            ids, mask = self._padded(encoded["input_ids"])
            found = self._words(texts, encoded["offset_mapping"]) if words else None
            policy = choose((mask if found is None else found.mask).sum(dim=1).numpy())
            seeds = seeds_of(texts)
            sampler = TokenSampler(policy, mask, seeds, is_decoder=self.is_decoder, words=found)
            self._read(ids, mask, taps, sampler.take)
            return replace(sampler.sampled(), seconds=time.perf_counter() - started)

    def check(self, fingerprint: str) -> None:
        """Refuse to be used where other weights are wanted.

        Raises:
            BackboneError: saying what to do.
        """
        if self.fingerprint != fingerprint:
            raise BackboneError(
                f"this device's backbone weights ({self.fingerprint[:8]}…, from {self.name}) are not the "
                f"job's ({fingerprint[:8]}…): install the same model, or point --backbone at it"
            )

    def check_head(self, fingerprint: str) -> None:
        """Refuse to be used where an output head is wanted; of none, the fingerprint is empty.

        Raises:
            BackboneError: saying what to do.
        """
        if fingerprint:
            raise BackboneError(f"{self.name}: was loaded without its output head")

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in use, by name."""
        return self._model.named_parameters()

    def _convert(self, precision: Precision) -> None:
        """Change the weights' precision in place, and see that the model still runs."""
        if precision == "f32":
            return
        if precision == "int8" and not any(isinstance(one, nn.Linear) for one in self._model.modules()):
            raise BackboneError(f"{self.name}: has no linear layers to keep in int8; use f32 or bf16")
        token = next(index for index in range(2) if index != self._tokenizer.pad_token_id)
        ids = torch.tensor([[token]])
        try:
            _to_int8(self._model) if precision == "int8" else _to_bf16(self._model)
            with torch.inference_mode():
                state = self._last_state(ids)
        except (RuntimeError, AttributeError, TypeError) as exc:
            raise BackboneError(f"{self.name}: cannot run in {precision}: {exc}; use f32") from exc
        if not torch.isfinite(state).all():
            raise BackboneError(f"{self.name}: gives no finite activations in {precision}; use f32")

    def _sees_ahead(self) -> bool:
        """Whether the first token's state depends on the second; configurations do not say reliably."""
        a, b, c = [token for token in range(4) if token != self._tokenizer.pad_token_id][:3]
        with torch.inference_mode():
            states = self._last_state(torch.tensor([[a, b], [a, c]]))
        return not torch.allclose(states[0, 0], states[1, 0], rtol=1e-5, atol=1e-6)

    def _tokenise(self, texts: Sequence[Text], longest: int) -> tuple[Tensor, Tensor]:
        """[K, T] token ids, padded on the right, and which are real."""
        return self._padded(self._encode(texts, longest)["input_ids"])

    def _encode(self, texts: Sequence[Text], longest: int, *, offsets: bool = False) -> Any:
        if offsets and not self._tokenizer.is_fast:
            raise BackboneError(f"{self.name}: its tokenizer does not tell where words are; use a fast one")
        how = {"truncation": True, "max_length": longest, "padding": False}
        return self._tokenizer(list(texts), return_offsets_mapping=offsets, **how)

    def _words(self, texts: Sequence[Text], offsets: Sequence[Sequence[tuple[int, int]]]) -> Words:
        numbers = [word_numbers(str(text), spans) for text, spans in zip(texts, offsets, strict=True)]
        return Words.of(numbers, is_decoder=self.is_decoder)

    def _padded(self, input_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        pad = self._tokenizer.pad_token_id or 0  # what stands under the mask is never looked at
        rows = [torch.tensor(list(ids) or [pad], dtype=torch.long) for ids in input_ids]
        lengths = torch.tensor([len(row) for row in rows])
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        return ids, torch.arange(ids.shape[1])[None, :] < lengths[:, None]

    def _last_state(self, ids: Tensor) -> Tensor:
        """[K, T] of real tokens -> [K, T, d] at the last layer."""
        states: list[Tensor] = []
        self._read(ids, torch.ones_like(ids, dtype=torch.bool), [self.depth], states.append)
        return states[0]

    def _read(
        self,
        ids: Tensor,
        mask: Tensor,
        taps: Sequence[int],
        take: Callable[[Tensor], None],
        **options: Any,
    ) -> None:
        """Hand each tap to ``take`` as soon as it is computed, and compute nothing beyond the last one."""
        hooks = [
            self._layers[tap - 1].register_forward_hook(_reader(take, is_last=tap == taps[-1]))
            for tap in taps
        ]
        try:
            self._model(input_ids=ids, attention_mask=mask.long(), **options)
        except _Done:
            return
        finally:
            for hook in hooks:
                hook.remove()
        raise BackboneError(f"{self.name}: the model's forward pass does not visit its layers in order")


def load_backbone(reference: str, layers: int = 0, precision: Precision = "f32") -> Backbone:
    """Load a frozen backbone.

    Args:
        reference: ``package:NAME`` for weights inside an installed package (which is not imported), a folder,
            or a name on the Hugging Face hub.
        layers: Keep only the first so many layers; 0 for all.
        precision: How to keep the weights in memory.

    Raises:
        BackboneError: it cannot be found or loaded; the message says what to do.
    """
    started = time.perf_counter()
    model, tokenizer = read_model(reference, AutoModel)
    backbone = Backbone(model, tokenizer, layers=layers, name=reference, precision=precision)
    tell_loaded(backbone, precision, time.perf_counter() - started)
    return backbone


def read_model(reference: str, kind: Any) -> tuple[Any, Any]:
    """A saved model as one of transformers' auto classes makes it, and its tokenizer.

    Raises:
        BackboneError: it cannot be found or loaded; the message says what to do.
    """
    place = locate(reference)
    with _quiet():
        try:
            model, report = kind.from_pretrained(place, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(place)
        except Exception as exc:  # transformers raises whatever its parts raise
            raise BackboneError(_not_loaded(reference, place, exc)) from exc
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # never reached, and made up at random where a checkpoint has none
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise BackboneError(f"{reference}: the checkpoint lacks {len(missing)} weights, such as {missing[0]}")
    model.config.use_cache = False
    return model, tokenizer


def tell_loaded(backbone: Backbone, precision: Precision, seconds: float) -> None:
    """Say what was loaded."""
    log.info(
        "backbone %s: %d layers of width %d in %s, fingerprint %s…, loaded in %.1f s",
        *(backbone.name, backbone.depth, backbone.width, precision, backbone.fingerprint[:8]),
        seconds,
    )


T = TypeVar("T", bound=Backbone)
_shared: dict[tuple[Any, ...], Backbone] = {}
_shared_lock = threading.Lock()


def shared_backbone(reference: str, layers: int = 0, precision: Precision = "f32") -> Backbone:
    """As :func:`load_backbone`, but loaded once in this process and shared by all its agents."""
    return shared(load_backbone, reference, layers, precision)


def shared(load: Callable[[str, int, Precision], T], reference: str, layers: int, precision: Precision) -> T:
    """What ``load`` makes of its arguments, made once in this process."""
    with _shared_lock:
        key = (load, reference, layers, precision)
        if key not in _shared:
            _shared[key] = load(reference, layers, precision)
        found: T = _shared[key]  # type: ignore[assignment]
        return found


def _not_loaded(reference: str, place: str, error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if Path(place).is_dir():
        return f"{reference}: cannot be loaded: {type(error).__name__}: {first_line}"
    offline = " (HF_HUB_OFFLINE is set, so nothing is downloaded)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"{reference}: no such folder here, and it cannot be had from the Hugging Face hub{offline}: "
        f"{first_line}. Download it where there is a network and point --backbone at the folder"
    )


def text_config(model: nn.Module) -> Any:
    """The configuration of a model, or of the text model in it."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _truncate(model: nn.Module, keep: int, name: str) -> nn.ModuleList:
    """Find the stack of layers, delete all after the first ``keep``, and return it."""
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise BackboneError(f"{name}: is an encoder-decoder; use an encoder or a decoder")
    count = int(getattr(config, "num_hidden_layers", 0))
    stacks = [
        (parent, attribute, module)
        for parent in model.modules()
        for attribute, module in parent.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == count > 0
    ]
    if not stacks:
        raise BackboneError(f"{name}: a {type(model).__name__} has no stack of layers that can be tapped")
    if not 0 <= keep <= count:
        raise BackboneError(f"{name}: has {count} layers, {keep} were asked for")
    parent, attribute, stack = stacks[0]
    if keep:
        stack = nn.ModuleList(stack[:keep])
        setattr(parent, attribute, stack)
        config.num_hidden_layers = keep  # some models count by it
    return stack


def _to_bf16(model: nn.Module) -> None:
    """All weights, in place. Not the buffers: rotary frequencies in bf16 would turn by wrong angles."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _to_int8(model: nn.Module) -> None:
    """Weights of linear layers, in place; what goes into these is quantised in each pass."""
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if torch.backends.quantized.engine == "none" and engines:
        torch.backends.quantized.engine = engines[0]
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for parameter in model.parameters():
        if id(parameter) not in linear:  # it stays, and as a part of a mapped file would keep all of that
            parameter.data = parameter.data.clone()
    with warnings.catch_warnings():
        # torch means to move this to another package, which we would rather not need.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        quantise: Any = torch.ao.quantization.quantize_dynamic
        # A scale for each output channel: with one a layer, MiniLM's sixth layer is hardly recognisable.
        kind = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        quantise(model, kind, dtype=torch.qint8, inplace=True)


def _longest_input(model: nn.Module, tokenizer: Any) -> int:
    """Tokens that the model and its tokenizer can take; RoBERTa's positions start after the padding id."""
    positions = int(getattr(text_config(model), "max_position_embeddings", 0) or 10**6)
    offset = max(
        (
            module.padding_idx + 1
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            and module.num_embeddings == positions
            and module.padding_idx is not None
        ),
        default=0,
    )
    return min(positions - offset, int(min(tokenizer.model_max_length, 10**6)))


def _fingerprint(parameters: Iterable[tuple[str, Tensor]], tokenizer: Any) -> str:
    """A hash of every weight's type, shape and bytes, and of what the tokenizer does.

    Neither parameter names nor the tokenizer's file go in: both change between versions of transformers while
    the model stays the same.
    """
    weights = sorted(_tensor_digest(parameter) for _, parameter in parameters)
    total = hashlib.blake2b(digest_size=16, person=b"sidestream-model")
    for digest in weights:
        total.update(digest)
    vocabulary = "\0".join(f"{token}\1{index}" for token, index in sorted(tokenizer.get_vocab().items()))
    total.update(hashlib.blake2b(vocabulary.encode(errors="replace")).digest())
    total.update(repr(tokenizer(_PROBE, verbose=False)["input_ids"]).encode())
    return total.hexdigest()


def _tensor_digest(parameter: Tensor) -> bytes:
    array = parameter.detach().cpu().numpy().astype("<f4", copy=False)
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=32)
    digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.digest()


def _reader(take: Callable[[Tensor], None], *, is_last: bool) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        take(output[0] if isinstance(output, tuple) else output)
        if is_last:
            raise _Done

    return hook


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and loading reports out of our log."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
