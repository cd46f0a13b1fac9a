"""A device without room for the whole model computes its own layers, and has the trainer do the rest.

Legend: K texts, N vectors in all of them, d hidden size.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import numpy as np

from edge_agent.answers.predicting import Predictor
from edge_agent.split_lora.reading import bundle_of
from edge_agent.weights.adopted import AdoptedWeights
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.inputs import Input
from sidestream.backbone.runtimes import RuntimeChoice, shared_backbone
from sidestream.backbone.sampled import Sampled
from sidestream.backbone.text_input import Tokens
from sidestream.contract.errors import MismatchError, StateError
from sidestream.contract.messages import MARK_BYTES, MAX_ASKED, Query, QueryReply, to_bin
from sidestream.contract.plan import SplitLora, TierPlan
from sidestream.contract.tasks import TASKS
from sidestream.contract.tensors import Codec, Floats, decode, encode, encoded_sizes
from sidestream.split_model.adapter_bundle import AdapterBundle
from sidestream.split_model.loading import lower_half

_HEADER_BYTES: Final = 512


class Asks(Protocol):
    """Whoever has the trainer answer: see :class:`edge_agent.answers.asking.Asker`."""

    place: int
    max_bytes: int

    def ask(self, query: Query) -> QueryReply:
        """The trainer's answer."""


class RemotePredictor(Predictor):
    """Sends the trainer what this device's layers make of texts.

    Of the texts themselves nothing is sent; but whoever has the backbone can read them from that.

    Args:
        kept: What an agent adopted.
        asker: Asks the trainer.
        backbone: Where the backbone is now, if it has moved since.
        runtime: What computes it.

    Raises:
        StateError: the job is a language model's: a trainer generates no text for devices.
        BackboneError: the backbone is not here, or not the one the adapters were trained for.
    """

    def __init__(
        self, kept: AdoptedWeights, asker: Asks, backbone: str = "", runtime: RuntimeChoice = "auto"
    ) -> None:
        adopted, bundle = kept.adopted, bundle_of(kept)
        about = bundle.about
        if TASKS[about.task].generates:
            raise StateError(
                "the trainer generates no text for devices, and this one has no room for the whole model: "
                "generate on a device that has, or load what trainer export --format peft writes"
            )
        super().__init__(version=adopted.version, labels=about.labels, task=about.task, scale=about.scale)
        self._run = adopted.run
        self._tier: TierPlan = adopted.tier_plan
        self._asker = asker
        self._backbone = shared_backbone(
            backbone or adopted.backbone, self._tier.layers, self._tier.precision, about.task, runtime=runtime
        )
        self._backbone.check(self._tier.fingerprint)
        method = adopted.method
        self._lower = _lower(self._backbone, bundle, method) if isinstance(method, SplitLora) else None

    def stream(self, prompt: str, *, frozen: bool = False, **options: Any) -> Iterator[str]:
        raise StateError("the adopted weights are no language model's; use predict")

    def _numbers(self, texts: Sequence[Input]) -> tuple[Floats, Sampled]:
        tokens = self._backbone.text_input.read(texts, self._tier.max_tokens)
        found = [self._ask(part) for part in self._parts(tokens)]
        numbers = np.concatenate(found)
        return numbers, Sampled(vectors=numbers[None], lengths=np.ones(len(texts), np.int64))

    def _parts(self, tokens: Tokens) -> Iterator[Tokens]:
        """Some of the texts each, no more than a batch has, nor a message."""
        lengths = tokens.mask.sum(axis=1)
        start, most = 0, min(self._tier.batch_size, MAX_ASKED)
        while start < len(lengths):
            end = start + 1
            while end < min(start + most, len(lengths)) and self._fits(int(lengths[start : end + 1].sum())):
                end += 1
            width = int(lengths[start:end].max())
            segments = None if tokens.segments is None else tokens.segments[start:end, :width]
            yield Tokens(tokens.ids[start:end, :width], tokens.mask[start:end, :width], segments)
            start = end

    @property
    def _codec(self) -> Codec:
        """The tier's, or int8 where that is a smaller one: of a text no second pass mends anything."""
        return self._tier.codec if self._tier.codec in (Codec.F32, Codec.F16) else Codec.INT8

    def _fits(self, vectors: int) -> bool:
        size = sum(encoded_sizes(self._codec, (vectors, self._tier.width)))
        return size + _HEADER_BYTES + 2 * MAX_ASKED <= self._asker.max_bytes

    def _ask(self, tokens: Tokens) -> Floats:
        """[K, C] of K texts."""
        lengths = tokens.mask.sum(axis=1)
        try:
            states = encode(self._states(tokens), self._codec)
        except ValueError as exc:
            raise StateError(f"a text cannot be sent: {exc}") from exc
        reply = self._asker.ask(
            Query(
                run=self._run,
                mark=secrets.token_bytes(MARK_BYTES),
                place=self._asker.place,
                fingerprint=self._tier.fingerprint,
                adapter=self.version,
                lengths=to_bin(lengths, "<u2"),
                states=states,
            )
        )
        assert reply.numbers is not None
        wanted = (len(lengths), TASKS[self.task].outputs(len(self.labels)))
        if reply.numbers.shape != wanted:
            raise MismatchError(f"the trainer's answer has shape {reply.numbers.shape}, not {wanted}")
        self._scale = reply.scale
        return decode(reply.numbers)

    def _states(self, tokens: Tokens) -> Floats:
        """[N, d]."""
        if self._lower is None:
            return self._backbone.states(tokens, self._backbone.depth)
        states: Floats = self._lower.forward(tokens).states
        return states


def _lower(backbone: Backbone, bundle: AdapterBundle, method: SplitLora) -> Any:
    lower = lower_half(backbone, method.lora)
    lower.load({name: array for name, array in bundle.tensors.items() if name in lower.names})
    return lower
