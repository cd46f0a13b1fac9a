"""Questions: the same words in another order have another class, and training does not give the test away."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from benchmarks.questions import ABOUT, NOUNS, TEST, TRAIN, Split, main, make_questions
from sidestream.demo.shards import Example

LABELS = set(NOUNS)


def halves(seed: int = 0, count: int = 1500) -> tuple[list[Example], list[Example]]:
    return (
        make_questions(TRAIN, seed=seed, count=count, fresh=False),
        make_questions(TEST, seed=seed, count=count, fresh=True),
    )


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert main([str(tmp_path / name), "--seed", str(seed), "--train", "60", "--test", "30"]) == 0
    for half, count in (("train", 60), ("test", 30)):
        once, again, other = ((tmp_path / name / f"{half}.jsonl").read_bytes() for name in "abc")
        assert once == again != other
        rows = [json.loads(line) for line in once.splitlines()]
        assert len({row["text"] for row in rows}) == count and {row["label"] for row in rows} <= LABELS


def test_no_class_is_rare_and_no_question_is_in_both_halves() -> None:
    train, test = halves()
    for half in (train, test):
        counts = Counter(one.label for one in half)
        assert set(counts) == LABELS and min(counts.values()) > len(half) / 9
        assert len({one.text for one in half}) == len(half)
    assert not {one.text for one in train} & {one.text for one in test}


@pytest.mark.parametrize("half", [0, 1])
def test_most_questions_have_a_twin_of_the_same_words_in_another_class(half: int) -> None:
    by_words = defaultdict[str, set[str]](set)
    questions = halves()[half]
    for one in questions:
        by_words[" ".join(sorted(one.text.split()))].add(one.label)
    twins = sum(len(by_words[" ".join(sorted(one.text.split()))]) > 1 for one in questions)
    assert twins > 0.6 * len(questions)


def test_training_and_test_share_no_template_and_the_test_has_nouns_of_its_own() -> None:
    assert not set(TRAIN.orders) & set(TEST.orders)
    assert not {template for _, template in TRAIN.events} & {template for _, template in TEST.events}
    train, test = (" ".join(one.text for one in half) for half in halves())
    for nouns in NOUNS.values():
        held = [noun.replace("-", " ") for noun in nouns.split()][-(len(nouns.split()) // 5) :]
        assert not any(re.search(rf"\b{noun}\b", train) for noun in held)
        assert any(re.search(rf"\b{noun}\b", test) for noun in held)


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_every_template_asks_for_what_its_class_says(split: Split) -> None:
    assert all(sorted(re.findall(r"{(\w)}", one)) == ["A", "B", "C"] for one in split.orders)
    for label, template in split.events:
        assert label in LABELS and sorted(re.findall(r"{(\w)}", template)) == ["E", "H", "L"]
    for text, label, *_ in make_questions(split, seed=1, count=300, fresh=True):
        asked = re.search(r"\b(?:which|what) (\w+)(?: (\w+))?", text)
        known = {noun.split("-")[0]: of for of, nouns in NOUNS.items() for noun in nouns.split()}
        if asked and (noun := asked[2] if asked[1] in ABOUT.split() else asked[1]) in known:
            assert known[noun] == label, text
