"""The frozen transformer as both wings know it: inputs in, sampled activations out, in NumPy.

What computes them is a runtime's (:mod:`sidestream.backbone.runtimes`); this module knows none. Nothing is
trained and no gradient is ever computed.

Legend: K inputs, T tokens of the longest, d hidden size.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from sidestream.backbone.images.image_input import Pixels
from sidestream.backbone.inputs import Input, seeds_of
from sidestream.backbone.preprocessor import Prepared, Preprocessor
from sidestream.backbone.sampled import Bools, Ints, Sampled
from sidestream.backbone.text_input import TextInput, Words
from sidestream.backbone.token_sampler import TokenSampler
from sidestream.contract.errors import BackboneError
from sidestream.contract.sampling import EVERY_TOKEN, Sampling
from sidestream.contract.tensors import Floats

Choose = Callable[[Ints], Sampling]
"""Given the lengths of K samples [K] before they are sampled, says by which policy to sample."""


class Backbone(ABC):
    """A frozen transformer and its preprocessor. Safe to share between threads: passes take turns.

    Args:
        name: For messages.
        preprocessor: What makes its numbers of inputs.
    """

    depth: int
    """Layers in use."""
    width: int
    """d."""
    is_decoder: bool
    """Whether a token only sees those before it, so that the last one carries the sentence."""
    fingerprint: str
    """32 hex digits: equal weights, preprocessor and configuration, equal fingerprint, on every machine, in
    every precision."""

    def __init__(self, name: str, preprocessor: Preprocessor) -> None:
        self.name = name
        self.preprocessor = preprocessor
        """What makes its numbers of inputs."""
        self._lock = threading.Lock()

    @property
    def text_input(self) -> TextInput:
        """The preprocessor of a backbone that takes texts."""
        assert isinstance(self.preprocessor, TextInput)
        return self.preprocessor

    def forward(
        self,
        inputs: Sequence[Input],
        taps: Sequence[int],
        max_tokens: int,
        choose: Choose = lambda lengths: EVERY_TOKEN,
        *,
        words: bool = False,
    ) -> Sampled:
        """Run ``inputs`` through the layers up to the last tapped one, and sample each tap as it is reached.

        Args:
            inputs: K of them.
            taps: Layers to read, 1 = the first layer's output, ascending, at most :attr:`depth`.
            max_tokens: Longer ones are cut, also to what the model can take.
            choose: Given the inputs' lengths in tokens [K], says by which policy to sample.
            words: Sample words, each by the token that stands for it, and not tokens; lengths are then in
                words. Of a pair of texts only the first one has any.

        Returns:
            NaN for inputs that could not be read, which the log names.

        Raises:
            BackboneError: ``words`` are asked for, and the tokenizer does not tell where they are.
        """
        with self._lock:
            started = time.perf_counter()
            found: Words | None = None
            if words:
                tokens, found = self.preprocessor.read_words(inputs, max_tokens, last=self.is_decoder)
            else:
                tokens = self.preprocessor.read(inputs, max_tokens)
            sampled_from = tokens.mask if found is None else found.tokens
            policy = choose(sampled_from.sum(axis=1))
            sampler = TokenSampler(policy, sampled_from, seeds_of(inputs), is_decoder=self.is_decoder)
            self._run(tokens, taps, sampler.take)
            sampled = sampler.sampled()
            if isinstance(tokens, Pixels) and tokens.unreadable.any():  # what is not finite is not used
                sampled.vectors[:, np.repeat(tokens.unreadable, sampled.lengths)] = np.nan
            return replace(
                sampled,
                words=None if found is None else found.numbers.ravel()[sampler.places],
                seconds=time.perf_counter() - started,
            )

    def sample(
        self, tokens: Prepared, taps: Sequence[int], policy: Sampling, sampled_from: Bools | None = None
    ) -> Sampled:
        """As :meth:`forward`, of token ids that need be no text's.

        Args:
            tokens: K rows.
            taps: As there.
            policy: One that draws at random draws the same for all rows.
            sampled_from: [K, T], which may be sampled; default: all.
        """
        mask = tokens.mask if sampled_from is None else sampled_from
        with self._lock:
            seeds = np.zeros(len(mask), np.int64)
            sampler = TokenSampler(policy, mask, seeds, is_decoder=self.is_decoder)
            self._run(tokens, taps, sampler.take)
            return sampler.sampled()

    def states(self, tokens: Prepared, layer: int) -> Floats:
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

    def check_inputs(self, inputs: Sequence[Input]) -> None:
        """Refuse inputs of which the model can make next to nothing.

        Args:
            inputs: The first ones of a device's own; none is as good as known.

        Raises:
            BackboneError: saying what to do.
        """
        with self._lock:
            self.preprocessor.check(inputs)

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
    def _run(self, tokens: Prepared, taps: Sequence[int], take: Callable[[Floats], None]) -> None:
        """Hand each tap [K, T, d] to ``take`` as soon as it is computed, and compute nothing beyond the last.

        What is handed over is the model's own memory: it is read while ``take`` runs, and not kept.
        """
