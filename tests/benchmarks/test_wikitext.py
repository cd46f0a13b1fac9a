"""WikiText's tokens are put back together as people write; any other text stays as it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.wikitext import as_written

_WORDS = ["lobster", ",", ".", "(", ")", '"', "'s", "=", "<unk>", "\n", "@-@"]


def test_punctuation_headings_and_numbers_are_as_people_write_them() -> None:
    text = (
        ' \n = = Range = = \n \n Homarus , known as the " common lobster , " weighs 0 @.@ 7 kg '
        "( 1 @,@ 500 g ) : the well @-@ known one doesn 't mind ; it 's a species ' own . \n It is eaten . \n"
    )
    assert as_written(text) == (
        '== Range ==\n\nHomarus, known as the "common lobster," weighs 0.7 kg (1,500 g): '
        "the well-known one doesn't mind; it's a species' own.\nIt is eaten.\n"
    )


def test_a_text_that_is_not_wikitext_stays_as_it_is() -> None:
    text = "First Citizen:\nBefore we proceed , hear me ( speak ) .\n"
    assert as_written(text) == text


@given(st.lists(st.sampled_from(_WORDS), max_size=40))
def test_no_word_is_lost_or_moved(tokens: list[str]) -> None:
    text = " ".join(["a @-@ b", *tokens, "end"])
    kept = as_written(text).replace("@-@", "-")
    assert kept.split() != [] and "".join(kept.split()) == "".join(text.replace("@-@", "-").split())
