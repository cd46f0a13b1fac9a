"""All attacks on ways to send, within a time budget: public text in, one result a way out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.sampled import Ints
from sidestream.contract.tensors import Floats
from sidestream.leakage import side_attacks
from sidestream.leakage.language import Language
from sidestream.leakage.proposals import Proposals, fit, signatures
from sidestream.leakage.scores import Found, found, function_words
from sidestream.leakage.search import Guess, Search
from sidestream.leakage.side_attacks import Share
from sidestream.leakage.way import Seen, Tell, Way, Whole, seen, whole

_KNOWN: Final = (0, 25, 100, 200)
_LEAST_SEARCH: Final = 0.5


class Material(NamedTuple):
    """What an attacker starts from, and what is attacked."""

    public: Sequence[str]
    """Texts that anybody has."""
    texts: Sequence[str]
    """Those that are attacked."""
    labels: Sequence[str]
    """Of these; empty where they have none."""


@dataclass(kw_only=True)
class Result:
    """Of one way to send."""

    way: Way
    search: Found | None = None
    """The search attack; None where the time did not reach."""
    linear: Found
    """The linear inverter alone."""
    blind: Found
    """The guess that needs no upload: public text's most frequent words."""
    tokens: float = 0.0
    """Of an attack's best: tokens recovered at their place."""
    nearest: Share
    """Which of the texts attacked it is."""
    labels: Share | None = None
    """Their labels."""
    digits: Share | None = None
    """Whether there is a number."""
    names: Share | None = None
    """Whether there is a name."""
    rotated: dict[int, float] = field(default_factory=dict)
    """Under a secret rotation, F1 of words by how many sentences the attacker knows."""
    seconds: float = 0.0
    """Of the search, a text."""
    epsilon: float | None = None
    """Where there is noise: of two samples as far apart as two can be."""
    accuracy: float | None = None
    """Of a linear answer, where it was asked for."""
    guesses: list[str] = field(default_factory=list)
    """What the search found."""

    @property
    def worst(self) -> Found:
        """The strongest attack on the words."""
        every = [one for one in (self.search, self.linear) if one is not None]
        return max(every, key=lambda one: (one.exact / max(1, one.texts), one.content.f1, one.words.f1))


class Meter:
    """Attacks ways to send, with one backbone and one set of texts.

    Args:
        backbone: The public one.
        material: Texts.
        taps: All layers that the ways tap.
        seed: Of all that is drawn.
        tell: Given progress.
        max_tokens: Longer texts are cut.
        until: When the public texts must have been forwarded; what was not by then is left out.
    """

    def __init__(
        self,
        backbone: Backbone,
        material: Material,
        taps: Sequence[int],
        *,
        seed: int,
        tell: Tell,
        max_tokens: int,
        until: float,
    ) -> None:
        self._backbone, self._taps, self._seed, self._tell = backbone, taps, seed, tell
        self.interrupted = False
        """Whether Ctrl-C ended a search."""
        attacked = whole(backbone, taps, material.texts, max_tokens, tell)
        self._attacked = [one for one in attacked if one is not None]
        public = whole(backbone, taps, material.public, max_tokens, tell, until)
        self._public = [one for one in public if one is not None]
        """Those that the time was enough for."""
        known = [text for text, one in zip(material.public, public, strict=True) if one is not None]
        self._material = material._replace(public=known)
        self._language = Language(backbone, [one.tokens for one in self._public])
        self._functions = function_words(known)
        self._truths = [self.text_of(one.tokens) for one in self._attacked]

    def text_of(self, tokens: Ints) -> str:
        """Without what stands around every text."""
        inner = self._inner(tokens)
        text: str = self._backbone.text_input.tokenizer.decode(inner)
        return text

    def search_of(self, way: Way) -> tuple[Search, list[Seen]]:
        """The search attack on a way, fitted, and what the public texts give."""
        public = self._seen(way, self._public)
        table = self._table
        stages: list[Proposals] = []
        if len(way.taps) > 1:
            shallow = [one._replace(clean=one.clean[:1], sent=one.sent[:1]) for one in public]
            stages.append(
                fit(self._backbone, replace(way, taps=way.taps[:1]), shallow, self._language, table)
            )
        stages.append(fit(self._backbone, way, public, self._language, table))
        return Search(self._backbone, stages, self._language), public

    def measure(self, way: Way, seconds: float) -> Result:
        """Attack one way for so long at most.

        Returns:
            What was found by then; after Ctrl-C too, and then :attr:`interrupted` is set.
        """
        until = time.monotonic() + seconds
        self._tell(f"{way}: fitting the linear maps on {len(self._public)} public texts")
        search, public = self.search_of(way)
        attacked = self._seen(way, self._attacked)
        firsts = [search.first(one.sent) for one in attacked]
        result = Result(
            way=way,
            linear=self._found(firsts, attacked),
            blind=self._blind(attacked),
            nearest=side_attacks.nearest(attacked),
            labels=side_attacks.labels(attacked, self._material.labels) if self._material.labels else None,
            digits=self._attribute(public, attacked, side_attacks.has_digit),
            names=self._attribute(public, attacked, side_attacks.has_name),
            epsilon=self._epsilon(way, attacked),
        )
        result.tokens = self._in_place(firsts, attacked)
        began = time.monotonic()
        until = max(until, began + _LEAST_SEARCH * seconds)  # however long fitting took
        guesses = [one.tokens for one in self.searched(search, attacked, until, str(way))]
        if guesses:
            some = attacked[: len(guesses)]
            result.search = self._found(guesses, some)
            result.tokens = max(self._in_place(guesses, some), self._in_place(firsts[: len(some)], some))
            result.seconds = (time.monotonic() - began) / len(guesses)
            result.guesses = [self.text_of(one) for one in guesses]
        return result

    def searched(self, search: Search, uploads: Sequence[Seen], until: float, name: str) -> list[Guess]:
        """Search for uploads in turn, until the time is up or Ctrl-C: those that it came to."""
        guesses = list[Guess]()
        try:
            for number, one in enumerate(uploads):
                left = until - time.monotonic()
                if left <= 0:
                    break
                guesses.append(search.find(one.sent, left / (len(uploads) - number)))
                self._tell(f"{name}: {number + 1} of {len(uploads)} texts searched for")
        except KeyboardInterrupt:
            self.interrupted = True
        return guesses

    def rotated(self, way: Way) -> dict[int, float]:
        """F1 of words by the linear inverter, under a secret rotation, with so many sentences known."""
        search, public = self.search_of(way)
        attacked = self._seen(way, self._attacked)
        turns = side_attacks.random_turns(
            len(way.taps), self._backbone.width, np.random.default_rng(self._seed)
        )
        secret = side_attacks.turned(attacked, turns)
        scores = {}
        for known in _KNOWN:
            back = side_attacks.turned_back(secret, public[-known:] if known else [], turns)
            scores[known] = self._found([search.first(one.sent) for one in back], attacked).words.f1
        return scores

    def _seen(self, way: Way, texts: Sequence[Whole]) -> list[Seen]:
        rng = np.random.default_rng([self._seed, len(texts)])
        return seen(way, self._taps, texts, rng, is_decoder=self._backbone.is_decoder)

    @cached_property
    def _table(self) -> Floats:
        """Of the first layer, whatever is tapped: a token looks most like itself there, at the least cost."""
        self._tell("every token through the first layer, for what it looks like by itself")
        return signatures(self._backbone, 1, self._language)

    def _found(self, guesses: Sequence[Ints], attacked: Sequence[Seen]) -> Found:
        exact = [np.array_equal(guess, one.tokens) for guess, one in zip(guesses, attacked, strict=True)]
        texts = [self.text_of(guess) for guess in guesses]
        return found(texts, self._truths[: len(texts)], exact, self._functions)

    def _blind(self, attacked: Sequence[Seen]) -> Found:
        """The words that maximise nothing but what is known without an upload: the most frequent tokens."""
        usual = int(np.median([len(self._inner(one.tokens)) for one in self._public]))
        best = np.argsort(-self._language.log_counts, kind="stable")[:usual]
        guess = np.concatenate([self._language.before, best, self._language.after]).astype(np.int64)
        return self._found([guess] * len(attacked), attacked)

    def _attribute(
        self, public: Sequence[Seen], attacked: Sequence[Seen], has: Callable[[str], bool]
    ) -> Share | None:
        return side_attacks.attribute(public, self._material.public, attacked, self._material.texts, has)

    def _epsilon(self, way: Way, attacked: Sequence[Seen]) -> float | None:
        vectors = max(one.sent.shape[1] for one in attacked)
        return way.privacy.epsilon(self._backbone.width, 2 * (len(way.taps) * vectors) ** 0.5)

    def _inner(self, tokens: Ints) -> Ints:
        return tokens[len(self._language.before) : len(tokens) - len(self._language.after)]

    def _in_place(self, guesses: Sequence[Ints], attacked: Sequence[Seen]) -> float:
        """Share of tokens found at their place; none of a text whose length was missed."""
        pairs = [
            (self._inner(guess), self._inner(one.tokens))
            for guess, one in zip(guesses, attacked, strict=True)
        ]
        right = sum(int((guess == true).sum()) for guess, true in pairs if len(guess) == len(true))
        return right / max(1, sum(len(true) for _, true in pairs))
