r"""A question-type set in which the order of the words decides, made from a seed: six classes, as TREC's.

    python benchmarks/questions.py FOLDER --seed 0
    python benchmarks/accuracy.py --train FOLDER/train.jsonl --eval FOLDER/test.jsonl --tiers full:0 \
        --rows linear,central,lora --no-memory

The first writes ``train.jsonl`` and ``test.jsonl``, the second holds methods against each other on them. A
question asks for one thing and mentions others of other classes; what is asked for is its class. Most
questions come in sets of the same words in other orders, each asking for another of their nouns: which words
there are says little of the class. A third is of the plain kind (who, where, how many, why), with such nouns
about. Training and test share no template, and a fifth of the test's nouns are in no training question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.program import run_program
from benchmarks.workload import write_examples
from sidestream.demo.shards import Example

NOUNS: Final[Mapping[str, str]] = {
    "human": "king poet singer painter general nurse author senator actor baker sailor judge coach "
    "inventor pilot surgeon widow farmer dancer spy captain bishop lawyer guard teacher composer",
    "location": "city river island valley harbour village country lake desert mountain street canyon "
    "province coast castle forest bridge park border peninsula suburb glacier airport square",
    "entity": "sword drug dish language flag animal instrument film disease currency flower car drink "
    "religion novel metal ship statue bird song medal crystal vaccine engine painting spice",
    "number": "price height distance population speed weight salary age temperature score depth length "
    "budget percentage width tax rate fee date year total size quantity debt dose",
    "description": "reason purpose origin meaning cause definition explanation motive consequence method "
    "nature background significance procedure symptom advantage tradition habit difference",
    "abbreviation": "acronym abbreviation initialism initials shorthand abbreviated-name short-form "
    "contraction letter-code ticker-symbol",
}
"""By class; of each the last fifth is kept for the test."""
ABOUT: Final = (
    "old famous first second northern royal young lost broken small national modern green wooden hidden "
    "dutch medieval popular cheap secret eastern foreign ancient early late common rare missing"
)
"""Words before a noun."""


class Split(NamedTuple):
    """What questions of one half are made of: A is what is asked for, B and C are not."""

    orders: tuple[str, ...]
    """In which any noun may stand anywhere."""
    events: tuple[tuple[str, str], ...]
    """About a human H, an entity E and a location L: class and template."""
    begins: tuple[str, ...]
    """Before a question."""
    ends: tuple[str, ...]
    """After it."""


TRAIN: Final = Split(
    orders=(
        "what {A} does the {B} of the {C} have",
        "what is the {A} of the {B} near the {C}",
        "which {A} belongs to the {B} and not to the {C}",
        "the {B} of the {C} had which {A}",
        "tell me the {A} that goes with the {B} and the {C}",
        "name the {A} given for the {B} in the {C}",
        "for the {B} and the {C} , what {A} is known",
        "give the {A} behind the {B} , not the {C}",
        "besides the {B} , which {A} did the {C} get",
        "with the {C} in mind , what would be the {A} of that {B}",
        "the {C} that has a {B} also has what {A}",
        "of the {B} and its {C} , what was the {A}",
    ),
    events=(
        ("human", "which {H} brought the {E} to the {L}"),
        ("entity", "the {H} brought which {E} to the {L}"),
        ("location", "the {H} brought the {E} to which {L}"),
        ("entity", "what {E} did the {H} sell in the {L}"),
        ("location", "in what {L} did the {H} sell the {E}"),
        ("human", "the {E} was sold in the {L} by what {H}"),
        ("human", "who found the {E} of the {H} in the {L}"),
        ("human", "whose {E} did the {H} see at the {L}"),
        ("location", "where is the {L} {H} with the {E} from"),
        ("location", "where did the {H} leave the {E} of the {L}"),
        ("number", "how many times did the {H} bring the {E} to the {L}"),
        ("number", "when was the {E} of the {H} seen in the {L}"),
        ("number", "how much did the {H} of the {L} pay for the {E}"),
        ("description", "why did the {H} hide the {E} in the {L}"),
        ("description", "how does the {E} of the {L} work for the {H}"),
        ("description", "what is an {E} for a {H} in a {L}"),
        ("abbreviation", "what do the letters on the {E} of the {H} in the {L} stand for"),
        ("abbreviation", "how is the {E} of the {L} written in short by the {H}"),
    ),
    begins=("", "", "", "please ,", "so", "by the way ,", "once more :", "in the book ,"),
    ends=("", "", "", "at that time", "in the end", "as far as we know", "back then"),
)
"""Of the training questions."""
TEST: Final = Split(
    orders=(
        "which {A} has the {B} of the {C}",
        "what was the {A} for the {C} and the {B}",
        "i want to know the {A} of the {B} by the {C}",
        "the {C} with the {B} has what {A}",
        "name the {A} that the {B} shares with the {C}",
        "unlike the {B} , what {A} does the {C} have",
        "among the {B} and the {C} , which {A} is meant",
    ),
    events=(
        ("human", "which {H} took the {E} from the {L}"),
        ("entity", "the {H} took which {E} from the {L}"),
        ("location", "the {H} took the {E} from which {L}"),
        ("entity", "what {E} was bought by the {H} near the {L}"),
        ("location", "near what {L} was the {E} bought by the {H}"),
        ("human", "who saw the {H} of the {L} with the {E}"),
        ("location", "where can the {H} buy the {E} of the {L}"),
        ("number", "how many days did the {H} need the {E} at the {L}"),
        ("description", "why was the {E} in the {L} of use to the {H}"),
        ("abbreviation", "what does the {H} in the {L} take the letters of the {E} to mean"),
    ),
    begins=("", "", "well ,", "now ,", "in the film ,", "just asking :"),
    ends=("", "", "in those days", "after all", "if anything"),
)
"""Of the test's."""


def make_questions(split: Split, *, seed: int, count: int, fresh: bool) -> list[Example]:
    """So many distinct questions, in random order.

    Args:
        split: What they are made of.
        seed: Decides them.
        count: How many.
        fresh: Whether nouns that training lacks are among them.
    """
    rng, found = np.random.default_rng([seed, fresh]), dict[str, str]()
    while len(found) < count:
        for text, label in _ordered(split, rng, fresh) if rng.random() < 2 / 3 else _event(split, rng, fresh):
            found.setdefault(text, label)
    questions = [Example(text, label) for text, label in found.items()]
    return [questions[at] for at in rng.permutation(len(questions))[:count].tolist()]


def _ordered(split: Split, rng: np.random.Generator, fresh: bool) -> Iterator[tuple[str, str]]:
    """The same words in several orders: each noun is asked for once."""
    classes = [list(NOUNS)[at] for at in rng.permutation(len(NOUNS))[:3]]
    phrases = {label: _noun(label, rng, fresh) for label in classes}
    frame = _framed(_pick(split.orders, rng), split, rng)
    for turn in range(3):
        order = classes[turn:] + classes[:turn]
        if rng.random() < 0.5:
            order[1:] = order[:0:-1]
        yield frame.format(**dict(zip("ABC", (phrases[one] for one in order), strict=True))), order[0]


def _event(split: Split, rng: np.random.Generator, fresh: bool) -> Iterator[tuple[str, str]]:
    label, template = split.events[rng.integers(len(split.events))]
    slots = {"H": "human", "E": "entity", "L": "location"}
    yield _framed(template, split, rng).format(**{s: _noun(of, rng, fresh) for s, of in slots.items()}), label


def _framed(template: str, split: Split, rng: np.random.Generator) -> str:
    return " ".join(
        part for part in (_pick(split.begins, rng), template, _pick(split.ends, rng), "?") if part
    )


def _noun(label: str, rng: np.random.Generator, fresh: bool) -> str:
    known = NOUNS[label].split()
    if not fresh:
        known = known[: len(known) - len(known) // 5]
    about = _pick(ABOUT.split(), rng) + " " if rng.random() < 0.4 else ""
    return about + _pick(known, rng).replace("-", " ")


def _pick(some: Sequence[str], rng: np.random.Generator) -> str:
    return some[int(rng.integers(len(some)))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    train = make_questions(TRAIN, seed=args.seed, count=args.train, fresh=False)
    test = make_questions(TEST, seed=args.seed, count=args.test, fresh=True)
    paths = [
        write_examples(args.folder / f"{name}.jsonl", half)
        for name, half in (("train", train), ("test", test))
    ]
    return "\n".join(map(str, paths))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="questions", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="where train.jsonl and test.jsonl go")
    add("--seed", type=int, default=0, help="decides the questions")
    add("--train", type=int, default=4000, help="training questions")
    add("--test", type=int, default=2000, help="test questions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
