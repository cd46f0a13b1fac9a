"""How labels are spelt: what is one label, and what looks like one and is not. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Final

_FORMAT: Final = "Cf"  # characters that are not seen: zero-width spaces and joiners, marks of direction


def normal(label: str) -> str:
    """Unicode's normal form C without white space at its ends: labels that are equal in it are one."""
    return unicodedata.normalize("NFC", label).strip()


def alike(label: str) -> str:
    """The same for labels that differ only in case, in spaces, or in what is not seen, or are one number."""
    text = unicodedata.normalize("NFKC", label).casefold()
    seen = "".join(char for char in text if not char.isspace() and unicodedata.category(char) != _FORMAT)
    try:
        return f"{float(seen):g}" if seen and seen[0] in "+-.0123456789" else seen
    except ValueError:
        return seen


def unseen(label: str) -> list[str]:
    """Names of the characters in it that are not seen."""
    hidden = sorted({char for char in label if unicodedata.category(char) == _FORMAT})
    return [unicodedata.name(char, f"U+{ord(char):04X}") for char in hidden]


class Spellings:
    """Labels as they came, by who brought them; tells what is odd about each, once."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._known: dict[str, dict[str, str]] = {}
        self._told: set[str] = set()

    def add(self, labels: Iterable[str], source: str) -> list[str]:
        """What is odd about labels that ``source`` brings, in words; each thing once."""
        found: list[str] = []
        for label in labels:
            key = alike(label)
            spelt = self._known.setdefault(key, {}) if len(self._known) < self._most else self._known.get(key)
            if spelt is None or label in spelt or len(spelt) >= self._most:
                continue
            found += self._oddities(label, source, key, spelt)
            spelt[label] = source
        return found

    def _oddities(self, label: str, source: str, key: str, spelt: dict[str, str]) -> list[str]:
        found = []
        if hidden := unseen(label):
            found.append(f"label {label!a} of {source} holds what is not seen: {', '.join(hidden).lower()}")
        if spelt and key not in self._told:
            self._told.add(key)
            other, of = next(iter(spelt.items()))
            found.append(
                f"labels {ascii_or(other)} ({of}) and {ascii_or(label)} ({source}) are two: they differ in "
                "no more than case, spaces or how a number is written: write them alike to make them one"
            )
        return found


def ascii_or(label: str) -> str:
    """A label in quotes; what is not seen in it is written out."""
    return ascii(label) if unseen(label) else repr(label)
