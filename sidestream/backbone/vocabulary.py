"""Does a tokenizer fit its model, and what of some texts does it know?

Where a saved model lacks some of its tokenizer's files, transformers makes one of what there is without a
word: every word becomes the unknown token or is cut to letters, and everything runs, learns, and means
nothing. A vocabulary is judged by itself (whether it gives back its own words), so that languages, bytes and
small vocabularies of a domain are all right; whether it knows the device's texts, by those. English it only
has to know where the model has embeddings for far more tokens than there are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from sidestream.backbone.inputs import Text
from sidestream.contract.errors import BackboneError

_PROBED: Final = 64
_LEAST: Final = 4
"""Ordinary tokens: with fewer there is nothing to tell apart."""
_MOST_UNKNOWN: Final = 0.5
"""Of its own words."""
_LEAST_OWN: Final = 0.1
"""Of its own longer words: how many it must give back whole. Tokenizers do with most; without their merges,
with none."""
_LETTERS: Final = 3
_ENOUGH: Final = 8
_PLAIN: Final = (
    "Please turn the lights on in the kitchen at 7 o'clock.",
    "The quick brown fox, 12345 times.",
)
_MOST_PLAIN_UNKNOWN: Final = 0.1
_FEWEST: Final = 8
"""Texts that it takes to refuse a device for what is in them."""
_HOPELESS: Final = 0.9
"""Share of a device's own texts that a tokenizer may not know, and past which nothing can be learnt."""
_DOUBTFUL: Final = 0.3
_REMEDY: Final = "save the tokenizer that the model was trained with beside it, or use another model"
log = logging.getLogger(__name__)


def check_tokenizer(tokenizer: Any, rows: int, name: str) -> None:
    """See that a tokenizer has words, knows them again, and names no token that the model has none for.

    Args:
        tokenizer: The tokenizer.
        rows: How many tokens the model has an embedding for; 0 if that is not known.
        name: For messages.

    Raises:
        BackboneError: it does not fit.
    """
    ordinary = ordinary_ids(tokenizer)
    highest = max([*ordinary, *_always_there(tokenizer)], default=0)
    if 0 < rows <= highest:
        raise BackboneError(
            f"{name}: its tokenizer has a token {highest}, and the model's highest is {rows - 1}; {_REMEDY}"
        )
    if len(ordinary) < _LEAST:
        raise BackboneError(
            f"{name}: its tokenizer knows {len(ordinary)} words, as if its files were missing; {_REMEDY}"
        )
    if 2 * len(tokenizer) < rows and unknown_share(tokenizer, _PLAIN) > _MOST_PLAIN_UNKNOWN:
        raise BackboneError(
            f"{name}: its tokenizer knows {len(tokenizer)} tokens of the {rows} that the model has, and few "
            f"English words, as if its files were cut; {_REMEDY}"
        )
    _check_own_words(tokenizer, ordinary, name)


def _always_there(tokenizer: Any) -> list[int]:
    """Special tokens that texts get, and the unknown one; a padding token is never looked at."""
    unknown = tokenizer.unk_token_id
    around: list[int] = tokenizer("", verbose=False)["input_ids"]
    return around if unknown is None else [*around, unknown]


def _check_own_words(tokenizer: Any, ordinary: Sequence[int], name: str) -> None:
    chosen = list(ordinary[:: max(1, len(ordinary) // _PROBED)])
    words = [tokenizer.convert_tokens_to_string([one]) for one in tokenizer.convert_ids_to_tokens(chosen)]
    share = unknown_share(tokenizer, [word for word in words if word.strip()])
    long = [
        token in tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"]
        for token, word in zip(chosen, words, strict=True)
        if len(word.strip()) >= _LETTERS and word.strip().isalpha()
    ]
    is_cut = len(long) >= _ENOUGH and sum(long) < _LEAST_OWN * len(long)
    if share > _MOST_UNKNOWN or is_cut:
        what = "cuts its own words to pieces" if is_cut else f"does not know {share:.0%} of its own words"
        raise BackboneError(f"{name}: its tokenizer {what}, as if some of its files were missing; {_REMEDY}")


def check_texts(tokenizer: Any, texts: Sequence[Text], name: str) -> None:
    """See that a tokenizer knows a device's texts; where it knows some, or there are few, it only warns.

    Raises:
        BackboneError: it knows next to nothing of them.
    """
    share = unknown_share(tokenizer, texts)
    if share > _HOPELESS and len(texts) >= _FEWEST:
        raise BackboneError(
            f"{name}: its tokenizer does not know {share:.0%} of the words in this device's first "
            f"{len(texts)} texts: it does not fit them, or not the model; {_REMEDY}"
        )
    if share > _DOUBTFUL:
        log.warning(
            "%s: its tokenizer does not know %.0f %% of the words in this device's first %d texts; "
            "another backbone may suit them better",
            *(name, 100 * share, len(texts)),
        )


def unknown_share(tokenizer: Any, texts: Sequence[Text]) -> float:
    """Of the texts' tokens, special ones aside: how many are the unknown one; 0 without texts."""
    unknown = tokenizer.unk_token_id
    if unknown is None or not texts:
        return 0.0
    flat = [part for text in texts for part in ((text,) if isinstance(text, str) else text)]
    encoded = tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = [token for row in encoded for token in row]
    return tokens.count(unknown) / max(1, len(tokens))


def ordinary_ids(tokenizer: Any) -> list[int]:
    """Every token that is no special one, in order."""
    special = set(tokenizer.all_special_ids)
    return sorted(index for index in set(tokenizer.get_vocab().values()) if index not in special)


def some_ids(tokenizer: Any, count: int) -> list[int]:
    """Ordinary tokens, from all over the vocabulary; each several times if there are too few."""
    ordinary = ordinary_ids(tokenizer)
    step = max(1, len(ordinary) // count)
    return [ordinary[index * step % len(ordinary)] for index in range(count)]
