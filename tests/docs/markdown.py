"""Documentation as a script: what its fenced blocks and the hints before them say to do, in order. Pure.

A ``console`` block holds commands after ``$``; a ``python`` block is a program. Both run to their end and
must succeed, unless an HTML comment just before says otherwise, which a reader of the page does not see::

    <!-- test: file trainer.toml -->      the block is that file
    <!-- test: background "ready" -->     its commands go on running; wait until they print this
    <!-- test: fails 1 -->                its commands exit with this code
    <!-- test: skip REASON -->            it is not run
    <!-- test: machine NAME -->           from here on, on that machine: another home and working directory
    <!-- test: data commands.csv -->      the reader has such a file: labelled commands to a home
    <!-- test: copy MACHINE PATH -->      the reader brings that file over from there
    <!-- test: reload NAME -->            the block tells the background command that begins so to reload
    <!-- test: wait NAME "text" -->       wait until a background command that begins so has printed this
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

_HINT = re.compile(r"<!-- test: (\w+) ?(.*?) -->")
_RUNS = ("console", "python")
KINDS = ("file", "background", "fails", "skip", "machine", "data", "copy", "reload", "wait")
_ALONE = ("machine", "data", "copy", "wait")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing to do."""

    kind: str
    """One of :data:`KINDS`, ``console`` or ``python``."""
    words: tuple[str, ...]
    """The hint's own."""
    text: str
    """The block's content."""
    line: int
    """Where it stands, from 1."""

    def commands(self) -> list[str]:
        """The commands of a console block; a backslash at a line's end joins the next one."""
        joined = self.text.replace("\\\n", " ")
        return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def steps(page: str) -> list[Step]:
    """Everything that a page's reader would do."""
    found: list[Step] = []
    hint: tuple[str, tuple[str, ...]] | None = None
    lines = page.splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        if match := _HINT.fullmatch(line.strip()):
            assert match[1] in KINDS, f"line {at + 1}: no such hint: {match[1]}"
            words = (match[2],) if match[1] == "skip" else tuple(shlex.split(match[2]))
            if match[1] in _ALONE:
                found.append(Step(kind=match[1], words=words, text="", line=at + 1))
            else:
                hint = (match[1], words)
        elif line.startswith("```"):
            end = lines.index("```", at + 1)
            language, text = line[3:].strip(), "\n".join(lines[at + 1 : end]) + "\n"
            if hint is not None:
                found.append(Step(kind=hint[0], words=hint[1], text=text, line=at + 1))
            elif language in _RUNS:
                found.append(Step(kind=language, words=(), text=text, line=at + 1))
            hint, at = None, end
        elif line.strip():
            assert hint is None, f"line {at + 1}: the hint before it belongs to no block"
        at += 1
    return found
