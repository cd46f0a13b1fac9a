"""WikiText as people write: its tokens put back together. Pure.

WikiText comes as tokens with spaces between: ``the lobster , which weighs 0 @.@ 7 – 2 @.@ 2 kg``. A model
that has only read that has never met a comma or a line's end as other texts have them: on those, adapting it
would be learning a handful of tokens rather than a language.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

_INSIDE: Final = " @-@ "
_Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]
_RULES: Final[tuple[_Rule, ...]] = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r"\"[ \t]+([^\"\n]*?)[ \t]+\""), r'"\1"'),
    (re.compile(r"[ \t]+([,.;:!?%)\]}]+)(?=[\s\"'])"), r"\1"),
    (re.compile(r"([(\[{$£])[ \t]+"), r"\1"),
    (re.compile(r" ('(?:s|t|d|m|ll|re|ve)\b|n't\b)"), r"\1"),
    (re.compile(r"(?<=s) '(?= [a-z])"), "'"),
    (re.compile(r"=(?: =)+"), lambda found: found.group().replace(" ", "")),
    (re.compile(r"[ \t]*\n[ \t]*"), "\n"),
)


def as_written(text: str) -> str:
    """The text without the spaces that WikiText has put between its tokens; any other text as it is."""
    if _INSIDE not in text:
        return text
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.strip("\n ") + "\n"
