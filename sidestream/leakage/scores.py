"""What of a text was found again: its words, its content words, all of it. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

_WORD: Final = re.compile(r"\w+")
_FUNCTION_WORDS: Final = 150


class Score(NamedTuple):
    """Precision and recall of words, over all texts together."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Their harmonic mean; 0 where both are."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


class Found(NamedTuple):
    """How near some guesses are to the texts."""

    exact: int
    """Texts found again token for token."""
    texts: int
    """Texts attacked."""
    words: Score
    """Of all words, each as often as it stands there, wherever it stands."""
    content: Score
    """Of words that are none of public text's most frequent."""


def words_of(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return _WORD.findall(text.lower())


def function_words(public: Iterable[str], count: int = _FUNCTION_WORDS) -> frozenset[str]:
    """The words that public text has most of: they say least of what a text is about."""
    counts = Counter(word for text in public for word in words_of(text))
    return frozenset(word for word, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:count])


def found(
    guesses: Sequence[str], truths: Sequence[str], exact: Sequence[bool], functions: Collection[str]
) -> Found:
    """Compare guesses with the texts, one by one."""
    return Found(
        exact=sum(exact),
        texts=len(truths),
        words=_score([(words_of(a), words_of(b)) for a, b in zip(guesses, truths, strict=True)]),
        content=_score(
            [
                (
                    [w for w in words_of(a) if w not in functions],
                    [w for w in words_of(b) if w not in functions],
                )
                for a, b in zip(guesses, truths, strict=True)
            ]
        ),
    )


def _score(pairs: Sequence[tuple[list[str], list[str]]]) -> Score:
    both = sum((Counter(guess) & Counter(truth)).total() for guess, truth in pairs)
    guessed = sum(len(guess) for guess, _ in pairs)
    there = sum(len(truth) for _, truth in pairs)
    return Score(both / guessed if guessed else 0.0, both / there if there else 0.0)
