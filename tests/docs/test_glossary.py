"""The glossary says what the code says: terms live where it says, and no word of before is left."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.rooms import HOUSE, ROOT

_PAGE = ROOT / "docs" / "glossary.md"
RETIRED = {
    "standing": "leader election",
    "seal": "signing",
    "leaning": "logit adjustment",
    "shelf": "unlabelled store",
    "leash": "parent watch",
    "guardian": "parent watch",
    "namesake": "duplicate device",
    "foretell": "predict",
    "foretold": "predict",
}
"""Words that the code had of its own, and the terms that it has for them now."""


class Term(NamedTuple):
    """A line of the page."""

    name: str
    meaning: str
    place: str


def terms() -> list[Term]:
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `([\w.]+)` \|$", _PAGE.read_text("utf-8"), re.MULTILINE)
    return [Term(*line) for line in lines]


def _sources() -> Iterator[Path]:
    for house in HOUSE:
        yield from (ROOT / house).rglob("*.py")


def test_every_line_is_a_term_and_they_are_in_order() -> None:
    names = [term.name for term in terms()]
    rows = [line for line in _PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    assert len(names) == len(rows) - 2 > 30
    assert names == sorted(names)


@pytest.mark.parametrize("term", terms(), ids=lambda term: term.name)
def test_a_term_lives_where_it_is_said_to(term: Term) -> None:
    parts = term.place.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            assert hasattr(found, name) or name in getattr(found, "__annotations__", {}), term.place
            found = getattr(found, name, None)
        return
    raise AssertionError(term.place)


@pytest.mark.parametrize("word", RETIRED)
def test_no_word_of_before_is_left(word: str) -> None:
    pattern = re.compile(rf"(?<![a-z]){word}(?![a-z])", re.IGNORECASE)
    found = [str(path.relative_to(ROOT)) for path in _sources() if pattern.search(path.read_text("utf-8"))]
    assert not found, f"the field says {RETIRED[word]}"
