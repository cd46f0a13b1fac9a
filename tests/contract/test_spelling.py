"""Labels that look alike and are two are told of once, with both spellings and who has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.spelling import Spellings, alike, ascii_or, normal, unseen


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("On", "on"),
        ("lights on", "lights  on"),
        ("lights on", "lightson"),
        ("a\u200bb", "ab"),
        ("1", "1.0"),
        ("ß", "SS"),
    ],
)
def test_labels_that_differ_in_case_spaces_the_unseen_or_a_numbers_form_are_alike(
    one: str, other: str
) -> None:
    assert alike(one) == alike(other)
    [told] = [text for text in Spellings().add([one, other], "device a") if "are two" in text]
    assert ascii_or(one) in told and ascii_or(other) in told


@pytest.mark.parametrize(("one", "other"), [("on", "off"), ("1", "2"), ("1", "10"), ("a", "ä")])
def test_others_are_not(one: str, other: str) -> None:
    assert alike(one) != alike(other) and Spellings().add([one, other], "device a") == []


def test_both_spellings_are_told_with_their_devices_and_once() -> None:
    spellings = Spellings()
    assert spellings.add(["on", "off"], "device a") == []
    [told] = spellings.add(["On", "off"], "device b")
    assert "'on' (device a) and 'On' (device b)" in told
    assert spellings.add(["ON", "On"], "device c") == []


def test_what_is_not_seen_is_told_by_name() -> None:
    [told] = Spellings().add(["o\u200bn"], "device a")
    assert r"'o\u200bn' of device a" in told and "zero width space" in told
    assert unseen("o\u200bn") == ["ZERO WIDTH SPACE"] and unseen("on") == []


def test_it_remembers_only_so_many() -> None:
    spellings = Spellings(most=2)
    assert spellings.add(["a", "b", "c", "C"], "x") == []


@given(st.text())
def test_the_normal_form_is_its_own(label: str) -> None:
    assert normal(normal(label)) == normal(label)
    alike(label)
