"""The frozen transformer: loaded, cut to its first layers, fingerprinted, tapped.

Nothing is trained and no gradient is ever computed: every parameter is frozen and every pass runs in
inference mode. A backbone may be kept in bf16 or int8, which saves memory. Its fingerprint is taken before
that, from the weights as they were loaded, so that devices of one job may differ in precision. Before that,
too, a trial pass shows whether what is tapped is what the model says its layers give (:mod:`.trial`).

Legend: K texts, T tokens of the longest, B taps, d hidden size.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModel

from sidestream.backbone.taps import Sampled, TokenSampler, Words, seeds_of, word_numbers
from sidestream.backbone.text import Text
from sidestream.backbone.torch_runtime.fingerprint import fingerprint_of, with_configuration
from sidestream.backbone.torch_runtime.layer_stack import longest_input, segments_of, text_config
from sidestream.backbone.torch_runtime.mapped_weights import MappedWeights
from sidestream.backbone.torch_runtime.precision import to_bf16, to_int8
from sidestream.backbone.torch_runtime.saved_model import read_model
from sidestream.backbone.torch_runtime.trial import (
    LONG,
    SHORT,
    Given,
    Stopped,
    check_padding,
    explained,
    find_stack,
)
from sidestream.backbone.vocabulary import check_texts, check_tokenizer, some_ids
from sidestream.contract.errors import BackboneError
from sidestream.contract.plan import Precision
from sidestream.contract.sampling import EVERY_TOKEN, Sampling

_USUAL: Final = 140
"""Tokens of a text of usual length that is tried at load: some models work in chunks of 64, and draw lots."""
_FILLED: Final = 1024
"""Tokens of the longest text that is tried, and in the first layer only."""
log = logging.getLogger(__name__)


class Backbone:
    """A frozen transformer and its tokenizer. Safe to share between threads: passes take turns.

    Args:
        model: Any encoder or decoder of transformers, without a head.
        tokenizer: Its tokenizer.
        layers: Keep only the first so many layers; 0 for all.
        name: For messages.
        precision: How to keep it: as f32, as bf16, or with its linear layers quantised dynamically to int8.

    Raises:
        BackboneError: the model has no stack of layers that can be tapped, or fewer than ``layers``, or what
            it gives changes with the padding, or its tokenizer does not fit it, or it cannot be kept in
            ``precision``.
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
        text_config(self._model).use_cache = False
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        with explained(self._model, name):
            self._rows = _rows(self._model)
            check_tokenizer(tokenizer, self._rows, name)
            given = self._trial_texts()
            self._stack = find_stack(self._model, layers, given, name)
            self._layers = self._stack.layers
            self.depth = len(self._layers)
            """Layers in use."""
            self.width = int(text_config(self._model).hidden_size)
            """d."""
            self._longest = longest_input(self._model, tokenizer)
            self._segments = segments_of(self._model)
            self._try(given)
            self.is_decoder = not self._sees_ahead()
            """Whether a token only sees those before it, so that the last one carries the sentence."""
            # Reading every weight is for this alone: most tokens of a vocabulary may never be met.
            weights = MappedWeights(one for _, one in self.parameters()).sparing(self.parameters())
            self._of_weights = fingerprint_of(weights, tokenizer)
            self.fingerprint = with_configuration(self._of_weights, self._model)
            """32 hex digits: equal weights, tokenizer and configuration, equal fingerprint, on every machine
            and in every precision."""
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
            self._read(ids, mask, taps, sampler.take, **self._of_pairs(texts, encoded))
            return replace(sampler.sampled(), seconds=time.perf_counter() - started)

    def is_one(self, fingerprint: str) -> bool:
        """Whether a fingerprint is this backbone's.

        A job that began before the configuration was a part of fingerprints keeps the one that it has.
        """
        return fingerprint in (self.fingerprint, self._of_weights)

    def check(self, fingerprint: str) -> None:
        """Refuse to be used where another backbone is wanted.

        Raises:
            BackboneError: saying what to do.
        """
        if not self.is_one(fingerprint):
            raise BackboneError(
                f"this device's backbone weights ({self.fingerprint[:8]}…, from {self.name}) are not the "
                f"job's ({fingerprint[:8]}…): install the same model, with its tokenizer and config.json, or "
                f"point --backbone at it"
            )

    def check_texts(self, texts: Sequence[Text]) -> None:
        """Refuse texts of which the tokenizer knows next to nothing.

        Args:
            texts: The first ones of a device's own; none is as good as known.

        Raises:
            BackboneError: saying what to do.
        """
        with self._lock:  # a fast tokenizer is not for two threads at once
            check_texts(self._tokenizer, texts, self.name)

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
            to_int8(self._model) if precision == "int8" else to_bf16(self._model)
            with torch.inference_mode():
                state = self._last_state(ids)
        except Exception as exc:  # torch raises whatever its parts raise
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
        how: dict[str, Any] = {"truncation": True, "max_length": longest, "padding": False}
        if self._segments and any(isinstance(text, tuple) for text in texts):
            how["return_token_type_ids"] = True
        return self._tokenizer(list(texts), return_offsets_mapping=offsets, **how)

    def _of_pairs(self, texts: Sequence[Text], encoded: Any) -> dict[str, Tensor]:
        """Which text of its pair each token [K, T] is of, for models that ask; single texts are as ever."""
        if not (self._segments and any(isinstance(text, tuple) for text in texts)):
            return {}
        rows = [
            torch.tensor(ids if isinstance(text, tuple) else [0] * len(ids), dtype=torch.long)
            for text, ids in zip(texts, encoded["token_type_ids"], strict=True)
        ]
        segments = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"token_type_ids": segments.clamp(max=self._segments - 1)}

    def _trial_texts(self) -> Given:
        """Two texts of unequal length: tokens from all over the vocabulary."""
        ids = some_ids(self._tokenizer, LONG + SHORT)
        return self._given([ids[:LONG], ids[LONG:]])

    def _given(self, rows: Sequence[Sequence[int]]) -> Given:
        padded, mask = self._padded(rows)
        return {"input_ids": padded, "attention_mask": mask.long()}

    def _try(self, given: Given) -> None:
        """See that passes of all kinds give what they should, while the weights are as they were loaded.

        Raises:
            Exception: of whatever kind; they do not.
        """
        check_padding(self._every_state, given, self._model, self.name)
        usual = self._repeated(min(self._longest, _USUAL))
        check_padding(
            self._every_state, self._given([usual, usual[: 2 * len(usual) // 3]]), self._model, self.name
        )
        full = torch.tensor([self._repeated(min(self._longest, _FILLED))])
        with torch.inference_mode():
            self._read(full, torch.ones_like(full, dtype=torch.bool), [1], lambda state: None)

    def _repeated(self, length: int) -> list[int]:
        """A text of so many tokens, of a few: others would fetch their embeddings into memory."""
        few = some_ids(self._tokenizer, LONG)
        return (few * -(-length // len(few)))[:length]

    def _every_state(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """[K, T] -> L of [K, T, d]."""
        states: list[Tensor] = []
        with torch.inference_mode():
            self._read(ids, mask, range(1, self.depth + 1), lambda state: states.append(state.clone()))
        return states

    def _words(self, texts: Sequence[Text], offsets: Sequence[Sequence[tuple[int, int]]]) -> Words:
        numbers = [word_numbers(str(text), spans) for text, spans in zip(texts, offsets, strict=True)]
        return Words.of(numbers, is_decoder=self.is_decoder)

    def _padded(self, input_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        pad = self._tokenizer.pad_token_id or 0  # what stands under the mask is never looked at
        rows = [torch.tensor(list(ids) or [pad], dtype=torch.long) for ids in input_ids]
        lengths = torch.tensor([len(row) for row in rows])
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        if self._rows:  # a special token that the model has none for, as a padding token added later
            ids.clamp_(max=self._rows - 1)
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

        def hand_on(output: Any) -> None:
            take(self._stack.states(output, ids.shape[1]))

        hooks = [
            self._layers[tap - 1].register_forward_hook(_reader(hand_on, is_last=tap == taps[-1]))
            for tap in taps
        ]
        try:
            self._model(input_ids=ids, attention_mask=mask.long(), **options)
        except Stopped:
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


def _rows(model: nn.Module) -> int:
    """How many tokens the model has an embedding for; 0 if it does not say."""
    try:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return 0
    return int(getattr(embedding, "num_embeddings", 0))


def _reader(take: Callable[[Any], None], *, is_last: bool) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        take(output)
        if is_last:
            raise Stopped

    return hook
