"""MQTT topic names and filters: what is legal, and what matches what (MQTT 5, section 4.7)."""

import re
from collections.abc import Iterable

_MAX_BYTES = 65535


def check_topic(topic: str) -> None:
    """Raise ``ValueError`` unless ``topic`` may be published on."""
    _check_text(topic)
    if "+" in topic or "#" in topic:
        raise ValueError(f"a topic has no wildcards: {topic!r}")


def check_filter(topic_filter: str) -> None:
    """Raise ``ValueError`` unless ``topic_filter`` may be subscribed to."""
    _check_text(topic_filter)
    levels = topic_filter.split("/")
    for number, level in enumerate(levels, start=1):
        if "#" in level and (level != "#" or number != len(levels)):
            raise ValueError(f"'#' stands alone at the end of a filter: {topic_filter!r}")
        if "+" in level and level != "+":
            raise ValueError(f"'+' stands alone in its level: {topic_filter!r}")


class Filters:
    """A set of filters that a topic is held against; exact ones cost nothing, however many there are."""

    def __init__(self, filters: Iterable[str]) -> None:
        self._exact = frozenset(filters)
        wild = sorted(one for one in self._exact if "+" in one or "#" in one)
        self._wild = re.compile("|".join(map(_pattern, wild)), re.DOTALL) if wild else None

    def match(self, topic: str) -> bool:
        """Whether any of them matches a topic."""
        return topic in self._exact or (self._wild is not None and self._wild.fullmatch(topic) is not None)


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a message on ``topic`` reaches a subscriber of ``topic_filter``."""
    if topic.startswith("$") and topic_filter[:1] in ("+", "#"):
        return False
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(levels) or level not in ("+", levels[index]):
            return False
    return len(wanted) == len(levels)


def _pattern(topic_filter: str) -> str:
    """A regular expression for what a filter with wildcards matches; it is held against all that comes."""
    beneath = topic_filter == "#" or topic_filter.endswith("/#")
    levels = topic_filter.split("/")[: -1 if beneath else None]
    pattern = "/".join("[^/]*" if level == "+" else re.escape(level) for level in levels)
    if beneath:
        pattern += "(/.*)?" if levels else ".*"
    return rf"(?!\$){pattern}" if topic_filter[0] in "+#" else pattern


def _check_text(text: str) -> None:
    if not text:
        raise ValueError("a topic is at least one character long")
    if "\0" in text or len(text.encode()) > _MAX_BYTES:
        raise ValueError("a topic has no NUL characters and at most 65535 bytes")
