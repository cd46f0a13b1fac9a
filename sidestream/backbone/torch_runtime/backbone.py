"""Backbones that torch computes: loaded, cut to their first layers, fingerprinted, tapped.

Every parameter is frozen and every pass runs in inference mode. A backbone may be kept in bf16 or int8, which
saves memory. Its fingerprint is taken before that, from the weights as they were loaded, so that devices of
one job may differ in precision. Before that, too, a trial pass shows whether what is tapped is what the model
says its layers give (:mod:`.trial`).

Legend: K texts, T tokens of the longest, L layers, d hidden size.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModel

from sidestream.accelerator.torch_device import HERE, Placement
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.preprocessor import Prepared
from sidestream.backbone.text_input import TextInput, Tokens
from sidestream.backbone.torch_runtime.fingerprint import digests_of, fingerprint_of, tokenizing
from sidestream.backbone.torch_runtime.layer_stack import (
    Stack,
    is_above,
    longest_input,
    placed,
    read_taps,
    segments_of,
    text_config,
)
from sidestream.backbone.torch_runtime.mapped_weights import MappedWeights
from sidestream.backbone.torch_runtime.precision import convert
from sidestream.backbone.torch_runtime.saved_model import read_model
from sidestream.backbone.torch_runtime.trial import (
    LONG,
    SHORT,
    Given,
    check_padding,
    explained,
    find_stack,
)
from sidestream.backbone.vocabulary import some_ids
from sidestream.contract.plan import Precision
from sidestream.contract.tensors import Floats

_USUAL: Final = 140
"""Tokens of a text of usual length that is tried at load: some models work in chunks of 64, and draw lots."""
_FILLED: Final = 1024
"""Tokens of the longest text that is tried, and in the first layer only."""
T = TypeVar("T", bound="TorchBackbone")
log = logging.getLogger(__name__)


class TorchBackbone(Backbone):
    """A model of transformers.

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

    _auto: ClassVar[Any] = AutoModel
    """What of transformers reads a saved one."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        layers: int = 0,
        name: str = "backbone",
        precision: Precision = "f32",
    ) -> None:
        self._model = model.float().eval().requires_grad_(False)
        text_config(self._model).use_cache = False
        with explained(self._model, name):
            longest, segments = longest_input(self._model, tokenizer), segments_of(self._model)
            rows = _rows(self._model)
            super().__init__(name, TextInput(tokenizer, name, rows=rows, longest=longest, segments=segments))
            given = _given(self.trial_tokens())
            self._stack = find_stack(self._model, layers, given, name)
            self.depth = len(self._stack.layers)
            self.width = int(text_config(self._model).hidden_size)
            self._try(given)
            self.is_decoder = not self._sees_ahead()
            # Reading every weight is for this alone: most tokens of a vocabulary may never be met.
            weights = MappedWeights(one for _, one in self.parameters()).sparing(self.parameters())
            self._digests = digests_of(weights)
            self.fingerprint = self.fingerprint_of_first(self.depth)
        self.precision: Precision = precision
        """How it is kept."""
        self.placement = HERE
        """Where it is computed."""
        self._convert(precision)

    @classmethod
    def load(cls: type[T], reference: str, layers: int = 0, precision: Precision = "f32") -> T:
        """Load a saved one; :func:`sidestream.backbone.runtimes.load_backbone` says from where.

        Raises:
            BackboneError: it cannot be found or loaded, or used.
        """
        started = time.perf_counter()
        model, tokenizer = read_model(reference, cls._auto)
        found = cls(model, tokenizer, layers=layers, name=reference, precision=precision)
        log.info(
            "backbone %s: %d layers of width %d in %s, fingerprint %s…, loaded in %.1f s",
            *(found.name, found.depth, found.width, precision, found.fingerprint[:8]),
            time.perf_counter() - started,
        )
        return found

    def place(self, placement: Placement) -> None:
        """Compute somewhere else from now on."""
        with self._lock:
            self.placement = placed(self._model, self.precision, placement, self.name)

    def to_processor(self) -> None:
        """Compute on the processor from now on, for those who look into the model itself."""
        if self.placement is not HERE:
            self.place(HERE)

    @property
    def model(self) -> nn.Module:
        """The model itself, cut and frozen."""
        return self._model

    @property
    def stack(self) -> Stack:
        """Its layers."""
        return self._stack

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in use, by name."""
        return self._model.named_parameters()

    def fingerprint_of_first(self, layers: int) -> str:
        above = is_above(self._model, layers)
        kept = (digest for name, digest in self._digests.items() if not (above(name) or self._is_head(name)))
        return fingerprint_of(kept, tokenizing(self.text_input.tokenizer), self._model)

    def _is_head(self, name: str) -> bool:
        """Whether a weight is none of the layers' nor the embeddings'."""
        return False

    def twin(self: T) -> T:
        """The same weights in modules of its own, to which something may be added; no weight is copied.

        Both take turns where texts are read, for the tokenizer is the same one.
        """
        # What a pass in inference mode left behind can take part in no other: of that there is a copy.
        buffers = (one for one in self._model.buffers() if not one.is_inference())
        shared = {id(one): one for one in (*self._model.parameters(), *buffers)}
        found = copy.copy(self)
        found._model = copy.deepcopy(self._model, shared)
        layers = found._model.get_submodule(self.stack_path)
        assert isinstance(layers, nn.ModuleList)
        found._stack = self._stack._replace(layers=layers)
        return found

    @property
    def stack_path(self) -> str:
        """Where in the model its layers are, as parameters' names have it."""
        found: str
        (found,) = (path for path, module in self._model.named_modules() if module is self._stack.layers)
        return found

    def trial_tokens(self) -> Tokens:
        """Two texts of unequal length, of tokens from all over the vocabulary: to try the model with."""
        ids = some_ids(self.text_input.tokenizer, LONG + SHORT)
        return self.text_input.padded([ids[:LONG], ids[LONG:]])

    def _convert(self, precision: Precision) -> None:
        """Change the weights' precision in place, and see that the model still runs."""
        token = next(index for index in range(2) if index != self.text_input.tokenizer.pad_token_id)
        ids = torch.tensor([[token]])
        convert(self._model, precision, lambda: self._last_state(ids), self.name)

    def _sees_ahead(self) -> bool:
        """Whether the first token's state depends on the second; configurations do not say reliably."""
        a, b, c = [token for token in range(4) if token != self.text_input.tokenizer.pad_token_id][:3]
        with torch.inference_mode():
            states = self._last_state(torch.tensor([[a, b], [a, c]]))
        return not torch.allclose(states[0, 0], states[1, 0], rtol=1e-5, atol=1e-6)

    def _try(self, given: Given) -> None:
        """See that passes of all kinds give what they should, while the weights are as they were loaded.

        Raises:
            Exception: of whatever kind; they do not.
        """
        check_padding(self._every_state, given, self._model, self.name)
        usual = self._repeated(min(self.text_input.longest, _USUAL))
        check_padding(
            self._every_state,
            _given(self.text_input.padded([usual, usual[: 2 * len(usual) // 3]])),
            self._model,
            self.name,
        )
        full = torch.tensor([self._repeated(min(self.text_input.longest, _FILLED))])
        with torch.inference_mode():
            self.read(full, torch.ones_like(full, dtype=torch.bool), [1], lambda state: None)

    def _repeated(self, length: int) -> list[int]:
        """A text of so many tokens, of a few: others would fetch their embeddings into memory."""
        few = some_ids(self.text_input.tokenizer, LONG)
        return (few * -(-length // len(few)))[:length]

    def _every_state(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """[K, T] -> L of [K, T, d]."""
        states: list[Tensor] = []
        with torch.inference_mode():
            self.read(ids, mask, range(1, self.depth + 1), lambda state: states.append(state.clone()))
        return states

    def _last_state(self, ids: Tensor) -> Tensor:
        """[K, T] of real tokens -> [K, T, d] at the last layer."""
        states: list[Tensor] = []
        self.read(ids, torch.ones_like(ids, dtype=torch.bool), [self.depth], states.append)
        return states[0]

    def _run(self, tokens: Prepared, taps: Sequence[int], take: Callable[[Floats], None]) -> None:
        assert isinstance(tokens, Tokens)
        segments = tokens.segments
        more = {} if segments is None else {"token_type_ids": torch.from_numpy(segments)}
        ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
        send, fetch = self.placement.send, self.placement.fetch
        with torch.inference_mode():
            self.read(
                send(ids),
                send(mask),
                taps,
                lambda tap: take(fetch(tap.float()).numpy()),
                **self.placement.send_all(more),
            )

    def read(
        self,
        ids: Tensor,
        mask: Tensor,
        taps: Sequence[int],
        take: Callable[[Tensor], None],
        **options: Any,
    ) -> None:
        """Hand each tap [K, T, d] to ``take`` as soon as it is computed, and compute nothing beyond the last.

        Args:
            ids: [K, T].
            mask: [K, T] bool, which are real.
            taps: Layers to read, ascending.
            take: Is given what the layer gave, in the graph if one is kept.
            options: What else the model is called with.

        Raises:
            BackboneError: it does not come to the last of the taps.
        """
        given = {"input_ids": ids, "attention_mask": mask.long(), **options}
        read_taps(self._model, self._stack, given, taps, lambda tap: take(tap[:, : ids.shape[1]]), self.name)


def _rows(model: nn.Module) -> int:
    """How many tokens the model has an embedding for; 0 if it does not say."""
    try:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return 0
    return int(getattr(embedding, "num_embeddings", 0))


def _given(tokens: Tokens) -> Given:
    ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
    return {"input_ids": ids, "attention_mask": mask.long()}
