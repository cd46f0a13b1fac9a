"""A frozen decoder with its output head, as both wings know it: in NumPy, whatever computes it.

Legend: K windows, B taps, V vectors of all of them, M states, d hidden size.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from sidestream.backbone.backbone import Backbone, Choose
from sidestream.backbone.inputs import seeds_of
from sidestream.backbone.sampled import Bools, Ints, Sampled
from sidestream.backbone.text_input import Tokens, padded
from sidestream.backbone.token_sampler import TokenSampler
from sidestream.backbone.windows import Window, windows_of
from sidestream.contract.errors import BackboneError
from sidestream.contract.tasks import NO_TARGET
from sidestream.contract.tensors import Floats


class Decoding(Protocol):
    """One text as it grows: what the model has seen so far is kept, and not computed again."""

    def feed(self, tokens: Sequence[int]) -> Floats:
        """Show it the next tokens; return the taps [B, 1, d] of the last one."""


class LanguageModel(Backbone):
    """A frozen decoder, its tokenizer and its head."""

    head_fingerprint: str
    """What the plan's must be."""
    vocabulary: int
    """Tokens that the head has a logit for."""
    ends: tuple[int, ...]
    """Tokens that end a text."""

    @abstractmethod
    def judge(self, states: Floats, targets: Ints) -> tuple[Floats, Bools]:
        """[M, d] and [M] -> [M] losses in nats, and [M] whether the likeliest token is the target."""

    @abstractmethod
    def logits(self, states: Floats) -> Floats:
        """[M, d] last states -> [M, vocabulary]."""

    @abstractmethod
    def decoding(self, taps: Sequence[int]) -> Decoding:
        """A text to begin, with the layers to read."""

    @property
    def longest(self) -> int:
        """Tokens that it can see at once."""
        return self.text_input.longest

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
        return self._within(self.text_input.tokenizer(text, verbose=False)["input_ids"])

    def text(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without special ones."""
        text: str = self.text_input.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def windows(self, text: str, completion: str | None, max_tokens: int) -> list[Window]:
        """A sample as the model takes it: a plain text, or a prompt and the completion that ends it."""
        longest = min(max_tokens, self.longest)
        tokenizer, known = self.text_input.tokenizer, self.vocabulary
        return windows_of(tokenizer, text, completion, longest, vocabulary=known, ends=self.ends)

    def forward_windows(self, windows: Sequence[Window], taps: Sequence[int], choose: Choose) -> Sampled:
        """Run K windows through the layers; of the tokens with a target, sample each tap as it is reached.

        Args:
            windows: Each with one target at least.
            taps: Layers to read, ascending; the last one is the model's last in use.
            choose: Given how many targets each window has [K], says by which policy to sample.
        """
        with self._lock:
            started = time.perf_counter()
            tokens = Tokens(*padded([window.inputs for window in windows], 0))
            targets, _ = padded([window.targets for window in windows], NO_TARGET)
            told = targets != NO_TARGET
            seeds = seeds_of([" ".join(map(str, window.inputs)) for window in windows])
            sampler = TokenSampler(
                choose(told.sum(axis=1)),
                told,
                seeds,
                is_decoder=True,
                score=lambda states: self.judge(states, targets[told])[0],
            )
            self._run(tokens, taps, sampler.take)
            sampled = sampler.sampled()
            seconds = time.perf_counter() - started
            return replace(sampled, targets=targets.ravel()[sampler.places], seconds=seconds)

    def _within(self, tokens: Sequence[int]) -> list[int]:
        """Special tokens that the model has none for become its last one."""
        return [min(token, self.vocabulary - 1) for token in tokens]
