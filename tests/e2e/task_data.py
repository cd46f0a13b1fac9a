"""Small data sets of every task, drawn from a few words, that a pretrained encoder can tell apart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

_TOPICS: Final = {
    "music": ("play the new album", "turn up this song", "who sings this tune"),
    "weather": ("will it rain today", "how cold is it outside", "is a storm coming"),
    "food": ("cook some pasta", "a recipe for soup", "bake a chocolate cake"),
    "travel": ("book a flight", "find a hotel room", "rent a car at the airport"),
}
_GRADES: Final = ("terrible and disgusting", "rather bad", "just okay", "quite good", "wonderful and perfect")
_THINGS: Final = ("film", "meal", "trip", "book", "concert", "room")
_COLOURS: Final = ("red", "blue", "green", "yellow")
_ANIMALS: Final = ("dog", "horse", "cat", "cow")


def _multi_label(rng: random.Random) -> dict[str, Any]:
    chosen = rng.sample(sorted(_TOPICS), rng.choice((1, 2)))
    text = " and ".join(rng.choice(_TOPICS[topic]) for topic in chosen)
    return {"text": text, "label": chosen}


def _regression(rng: random.Random) -> dict[str, Any]:
    grade = rng.randrange(len(_GRADES))
    return {"text": f"the {rng.choice(_THINGS)} was {_GRADES[grade]}", "label": 100 + 20 * grade}


def _token_classification(rng: random.Random) -> dict[str, Any]:
    words, labels = ["we", "saw", "a"], ["O", "O", "O"]
    for kind, choices in rng.sample([("COLOUR", _COLOURS), ("ANIMAL", _ANIMALS)], 2):
        words += [rng.choice(choices), rng.choice(("there", "again", "today"))]
        labels += [kind, "O"]
    return {"tokens": words, "labels": labels}


def _pairs(rng: random.Random) -> dict[str, Any]:
    first, second = rng.choice(sorted(_TOPICS)), rng.choice(sorted(_TOPICS))
    second = first if rng.random() < 0.4 else second
    return {
        "text": rng.choice(_TOPICS[first]),
        "text_pair": rng.choice(_TOPICS[second]),
        "label": "same topic" if first == second else "another",
    }


ROWS: Final[Mapping[str, Callable[[random.Random], dict[str, Any]]]] = {
    "multi-label-classification": _multi_label,
    "regression": _regression,
    "token-classification": _token_classification,
    "text-classification": _pairs,
}
"""By task; a row at a time. Text classification is of pairs."""


def write(path: Path, task: str, rows: int, seed: int) -> Path:
    """A JSONL file of a task."""
    rng = random.Random(f"{task} {seed}")
    path.write_text("".join(json.dumps(ROWS[task](rng)) + "\n" for _ in range(rows)), encoding="utf-8")
    return path
