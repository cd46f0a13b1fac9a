"""The promises the demo data's README makes."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

SPLITS = ("train", "eval")


class Row(NamedTuple):
    """One labelled utterance."""

    text: str
    label: str


def read(name: str) -> str:
    return (files("sidestream") / "data" / name).read_text(encoding="utf-8")


@cache
def rows(split: str) -> tuple[Row, ...]:
    found = []
    for line in read(f"commands_{split}.jsonl").splitlines():
        record = json.loads(line)
        assert list(record) == ["text", "label"]
        found.append(Row(record["text"], record["label"]))
    return tuple(found)


def words(text: str) -> list[str]:
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def trigrams(text: str) -> list[str]:
    line = " ".join(words(text))
    return [line[i : i + 3] for i in range(len(line) - 2)]


def jaccard(features: list[set[str]]) -> npt.NDArray[np.float32]:
    """The Jaccard index of every pair of sets; the diagonal is nought."""
    column = {name: i for i, name in enumerate(sorted(set().union(*features)))}
    bags = np.zeros((len(features), len(column)), dtype=np.float32)
    for row, names in zip(bags, features, strict=True):
        row[[column[name] for name in names]] = 1
    shared = bags @ bags.T
    size = bags.sum(axis=1)
    index: npt.NDArray[np.float32] = shared / (size[:, None] + size[None, :] - shared)
    np.fill_diagonal(index, 0)
    return index


def test_size_and_intents() -> None:
    distinct = {row.text for split in SPLITS for row in rows(split)}
    assert len(distinct) >= 1200
    train, evaluation = ({row.label for row in rows(split)} for split in SPLITS)
    assert len(train) >= 20
    assert train == evaluation


@pytest.mark.parametrize(("split", "least"), [("train", 48), ("eval", 16)])
def test_every_intent_is_well_covered(split: str, least: int) -> None:
    assert min(Counter(row.label for row in rows(split)).values()) >= least


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_clean_and_shuffled(split: str) -> None:
    for row in rows(split):
        assert row.text == " ".join(row.text.split())
        assert 3 <= len(row.text.split()) <= 30, row.text
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", row.label)
    labels = [row.label for row in rows(split)]
    runs = sum(a != b for a, b in pairwise(labels))
    assert runs > 0.8 * len(labels)


def test_no_exact_duplicates() -> None:
    seen = Counter(" ".join(words(row.text)) for split in SPLITS for row in rows(split))
    assert [text for text, times in seen.items() if times > 1] == []


@pytest.mark.slow
def test_no_near_duplicates() -> None:
    both = [row.text for split in SPLITS for row in rows(split)]
    for index in (jaccard([set(words(t)) for t in both]), jaccard([set(trigrams(t)) for t in both])):
        close = np.argwhere(np.triu(index >= 0.6))
        assert [(both[i], both[j]) for i, j in close] == []


def test_readme_counts_match() -> None:
    readme = read("README.md")
    counts = {split: Counter(row.label for row in rows(split)) for split in SPLITS}
    table = re.findall(r"^\| `([a-z_]+)` \| .+ \| (\d+) \| (\d+) \|$", readme, flags=re.MULTILINE)
    assert {name: (int(train), int(held)) for name, train, held in table} == {
        name: (counts["train"][name], counts["eval"][name]) for name in counts["train"]
    }
    total = sum(len(rows(split)) for split in SPLITS)
    for cell, number in (
        ("`commands_train.jsonl`", len(rows("train"))),
        ("`commands_eval.jsonl`", len(rows("eval"))),
        ("Total", total),
    ):
        assert f"| {cell} | {number} |" in readme
    assert f"one of {len(counts['train'])} intents" in readme
    assert "licensed under Apache-2.0" in readme
