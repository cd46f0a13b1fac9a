"""Texts as a model takes them: token ids, cut to what it can see, padded, and where their words are.

Legend: K texts, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sidestream.backbone.inputs import Input, Text, texts_of
from sidestream.backbone.sampled import Bools, Ints
from sidestream.backbone.vocabulary import check_texts, check_tokenizer
from sidestream.contract.errors import BackboneError


class Tokens(NamedTuple):
    """Some texts' tokens, padded on the right."""

    ids: Ints
    """[K, T]."""
    mask: Bools
    """[K, T]: which are real, at least one in each row."""
    segments: Ints | None = None
    """[K, T]: which text of its pair each is of, for models that ask where there are pairs."""


class Words(NamedTuple):
    """Which tokens stand for words: each word's first, or, in a decoder, its last, which has seen it all."""

    tokens: Bools
    """[K, T]: one a row at least, even if its text has no word."""
    numbers: Ints
    """[K, T]: the words' numbers in their text; -1 for none."""


class TextInput:
    """A tokenizer with what its model can take. Not for two threads at once: fast tokenizers are not.

    Args:
        tokenizer: One of transformers', or what answers as one.
        name: The model's, for messages.
        rows: How many tokens the model has an embedding for; 0 if that is not known.
        longest: Tokens that it can see at once.
        segments: How many texts it tells apart by segment ids; 0 if it takes none.

    Raises:
        BackboneError: the tokenizer does not fit the model.
    """

    def __init__(self, tokenizer: Any, name: str, *, rows: int, longest: int, segments: int) -> None:
        check_tokenizer(tokenizer, rows, name)
        self.tokenizer = tokenizer
        """The tokenizer itself."""
        self.longest = longest
        """Tokens that the model can see at once."""
        self._name = name
        self.rows = rows
        """Tokens that it has an embedding for; 0 if that is not known."""
        self.segments = segments
        """Texts that it tells apart by segment ids; 0 if it takes none."""

    def read(self, inputs: Sequence[Input], max_tokens: int) -> Tokens:
        """Tokenise texts; longer ones are cut, also to what the model can take."""
        texts = texts_of(inputs)
        pairs = self.segments > 0 and any(isinstance(text, tuple) for text in texts)
        encoded = self._encoded(texts, max_tokens, **({"return_token_type_ids": True} if pairs else {}))
        tokens = self.padded(encoded["input_ids"])
        if not pairs:
            return tokens
        rows = [  # single texts are as ever
            given if isinstance(text, tuple) else [0] * len(given)
            for text, given in zip(texts, encoded["token_type_ids"], strict=True)
        ]
        return tokens._replace(segments=np.minimum(padded(rows, 0)[0], self.segments - 1))

    def read_words(self, inputs: Sequence[Input], max_tokens: int, *, last: bool) -> tuple[Tokens, Words]:
        """Tokenise texts whose words stand between white space; of a pair the first text only.

        Args:
            inputs: K texts.
            max_tokens: As in :meth:`read`.
            last: Whether a word's last token stands for it.

        Raises:
            BackboneError: the tokenizer does not tell where words are.
        """
        if not self.tokenizer.is_fast:
            raise BackboneError(f"{self._name}: its tokenizer cannot tell where words are; use a fast one")
        plain = [" ".join((text if isinstance(text, str) else text[0]).split()) for text in texts_of(inputs)]
        encoded = self._encoded(plain, max_tokens, return_offsets_mapping=True)
        tokens = self.padded(encoded["input_ids"])
        words = Words(np.zeros(tokens.mask.shape, bool), np.full(tokens.mask.shape, -1))
        for row, (text, offsets) in enumerate(zip(plain, encoded["offset_mapping"], strict=True)):
            numbers = word_numbers(text, offsets)
            places = _word_places(numbers, last=last)
            words.tokens[row, places] = True
            words.numbers[row, : len(numbers)] = numbers
        return tokens, words

    def check(self, inputs: Sequence[Input]) -> None:
        """Refuse texts of which the tokenizer knows next to nothing.

        Raises:
            BackboneError: saying what to do.
        """
        check_texts(self.tokenizer, texts_of(inputs), self._name)

    def padded(self, rows: Sequence[Sequence[int]]) -> Tokens:
        """Token ids of texts; those that the model has no embedding for become its last one."""
        pad = self.tokenizer.pad_token_id or 0  # what stands under the mask is never looked at
        ids, mask = padded([ids or [pad] for ids in rows], pad)
        return Tokens(np.minimum(ids, self.rows - 1) if self.rows else ids, mask)

    def _encoded(self, texts: Sequence[Text], max_tokens: int, **more: bool) -> Any:
        longest = min(max_tokens, self.longest)
        return self.tokenizer(list(texts), truncation=True, max_length=longest, padding=False, **more)


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Ints, Bools]:
    """K rows of numbers as [K, T], filled up on the right, and which of them are real."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    numbers = np.full(mask.shape, fill)
    numbers[mask] = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return numbers, mask


def word_numbers(text: str, offsets: Sequence[tuple[int, int]]) -> Ints:
    """Which word each token belongs to, by its last character; -1 for none.

    Args:
        text: The words with a single space between.
        offsets: For each token where in ``text`` it begins, and where it ends.
    """
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.cumsum([len(word) + 1 for word in text.split(" ")]) - 1  # of words, exclusive
    numbers = np.searchsorted(ends, spans[:, 1] - 1, side="right")
    return np.where(spans[:, 1] > spans[:, 0], numbers, -1)


def _word_places(numbers: Ints, *, last: bool) -> Ints:
    """Each word's first or last token, in the order of the text; the first of all where there is no word."""
    _, first = np.unique(numbers[::-1] if last else numbers, return_index=True)
    places = np.sort(len(numbers) - 1 - first if last else first)
    places = places[numbers[places] >= 0]
    return places if len(places) else np.zeros(1, np.int64)
