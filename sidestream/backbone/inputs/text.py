"""What goes through a text backbone."""

from __future__ import annotations

from typing import TypeAlias

Text: TypeAlias = str | tuple[str, str]
"""A text, or a pair of them."""
