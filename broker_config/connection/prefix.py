"""A prefix before every topic, for brokers that give a client a part of the tree. Pure.

What begins with $ is the broker's own and has none.
"""

from __future__ import annotations

from typing import NamedTuple


class Prefix(NamedTuple):
    """Levels, without a slash at either end; empty for none."""

    levels: str

    def out(self, topic: str) -> str:
        """A topic or filter of ours as the broker knows it."""
        return f"{self.levels}/{topic}" if self.levels and not topic.startswith("$") else topic

    def back(self, topic: str) -> str:
        """A topic of the broker's as we know it."""
        return topic.removeprefix(f"{self.levels}/") if self.levels else topic
