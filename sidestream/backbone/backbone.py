"""The frozen transformer as both wings know it: texts in, sampled activations out, in NumPy.

What computes them is a runtime's (:mod:`sidestream.backbone.runtimes`); this module knows none. Nothing is
trained and no gradient is ever computed.

Legend: K texts, T tokens of the longest, d hidden size.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from sidestream.backbone.sampled import Ints, Sampled
from sidestream.backbone.text import Text, seeds_of
from sidestream.backbone.text_input import TextInput, Tokens, Words
from sidestream.backbone.token_sampler import TokenSampler
from sidestream.backbone.vocabulary import check_texts
from sidestream.contract.errors import BackboneError
from sidestream.contract.sampling import EVERY_TOKEN, Sampling
from sidestream.contract.tensors import Floats

Choose = Callable[[Ints], Sampling]
"""Given the lengths of K samples [K] before they are sampled, says by which policy to sample."""


class Backbone(ABC):
    """A frozen transformer and its tokenizer. Safe to share between threads: passes take turns.

    Args:
        name: For messages.
        text_input: The tokenizer.
    """

    depth: int
    """Layers in use."""
    width: int
    """d."""
    is_decoder: bool
    """Whether a token only sees those before it, so that the last one carries the sentence."""
    fingerprint: str
    """32 hex digits: equal weights, tokenizer and configuration, equal fingerprint, on every machine and in
    every precision."""

    def __init__(self, name: str, text_input: TextInput) -> None:
        self.name = name
        self.text_input = text_input
        """What tokenises."""
        self._lock = threading.Lock()

    def forward(
        self,
        texts: Sequence[Text],
        taps: Sequence[int],
        max_tokens: int,
        choose: Choose = lambda lengths: EVERY_TOKEN,
        *,
        words: bool = False,
    ) -> Sampled:
        """Run ``texts`` through the layers up to the last tapped one, and sample each tap as it is reached.

        Args:
            texts: K of them.
            taps: Layers to read, 1 = the first layer's output, ascending, at most :attr:`depth`.
            max_tokens: Longer texts are cut, also to what the model can take.
            choose: Given the texts' lengths in tokens [K], says by which policy to sample.
            words: Sample words, each by the token that stands for it, and not tokens; lengths are then in
                words. Of a pair of texts only the first one has any.

        Raises:
            BackboneError: ``words`` are asked for, and the tokenizer does not tell where they are.
        """
        with self._lock:
            started = time.perf_counter()
            found: Words | None = None
            if words:
                tokens, found = self.text_input.read_words(texts, max_tokens, last=self.is_decoder)
            else:
                tokens = self.text_input.read(texts, max_tokens)
            sampled_from = tokens.mask if found is None else found.tokens
            policy = choose(sampled_from.sum(axis=1))
            sampler = TokenSampler(policy, sampled_from, seeds_of(texts), is_decoder=self.is_decoder)
            self._run(tokens, taps, sampler.take)
            return replace(
                sampler.sampled(),
                words=None if found is None else found.numbers.ravel()[sampler.places],
                seconds=time.perf_counter() - started,
            )

    def states(self, tokens: Tokens, layer: int) -> Floats:
        """[N, d]: what a layer gives for the real tokens, row by row; 1 is the first layer's output."""
        found: list[Floats] = []
        with self._lock:
            self._run(tokens, [layer], lambda tap: found.append(tap[tokens.mask].astype(np.float32)))
        return found[0]

    def check(self, fingerprint: str) -> None:
        """Refuse to be used where another backbone is wanted.

        Raises:
            BackboneError: saying what to do.
        """
        if fingerprint != self.fingerprint:
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
        with self._lock:
            check_texts(self.text_input.tokenizer, texts, self.name)

    def check_head(self, fingerprint: str) -> None:
        """Refuse to be used where an output head is wanted; of none, the fingerprint is empty.

        Raises:
            BackboneError: saying what to do.
        """
        if fingerprint:
            raise BackboneError(f"{self.name}: was loaded without its output head")

    @abstractmethod
    def fingerprint_of_first(self, layers: int) -> str:
        """What :attr:`fingerprint` is where only the first so many layers are loaded, and no output head."""

    @abstractmethod
    def _run(self, tokens: Tokens, taps: Sequence[int], take: Callable[[Floats], None]) -> None:
        """Hand each tap [K, T, d] to ``take`` as soon as it is computed, and compute nothing beyond the last.

        What is handed over is the model's own memory: it is read while ``take`` runs, and not kept.
        """
