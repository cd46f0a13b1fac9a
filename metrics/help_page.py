"""The fleet page's ``help.html``, written by ``python -m metrics.help_page docs/operations.md``.

A small part of Markdown is enough: headings, paragraphs, lists, tables, code, bold, italics, links within.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Final

SECTIONS: Final = ("Troubles", "Alerts")
"""What of the document is shown."""
_HEAD: Final = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Troubles and alerts · Sidestream</title>
<link rel="icon" href="icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="page.css">
</head>
<body>
<header class="top">
  <div class="brand"><img src="icon.svg" alt="" width="22" height="22"><span>Sidestream</span></div>
  <h1>Troubles and alerts</h1>
  <a class="facts" href="./">Back to the fleet</a>
</header>
<main class="help">
"""
_FOOT: Final = "</main>\n</body>\n</html>\n"
_INLINE: Final = (
    (re.compile(r"\*\*(.+?)\*\*"), r"<b>\1</b>"),
    (re.compile(r"(?<!\w)\*(.+?)\*(?!\w)"), r"<i>\1</i>"),
    (re.compile(r"\[(.+?)\]\((#.+?)\)"), r'<a href="\2">\1</a>'),
    (re.compile(r"\[(.+?)\]\((.+?)\)"), r"\1 (docs/\2)"),
)


def slug(heading: str) -> str:
    """A heading's anchor, as it is made from Markdown everywhere."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def help_page(document: str) -> str:
    """The page.

    Args:
        document: Markdown.
    """
    parts = re.split(r"^## (.+)\n", document, flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    shown = set(
        re.findall(r"^##+ (.+)$", "\n".join(f"## {name}\n{texts[name]}" for name in SECTIONS), re.MULTILINE)
    )
    anchors = {f"#{slug(heading)}" for heading in shown}
    body = "\n".join(_section(name, texts[name]) for name in SECTIONS)
    return (
        _HEAD
        + re.sub(r'<a href="(#.+?)">(.+?)</a>', lambda m: m[0] if m[1] in anchors else m[2], body)
        + _FOOT
    )


def _section(name: str, text: str) -> str:
    blocks = [block.strip("\n") for block in re.split(r"\n\n+", text) if block.strip()]
    return "\n".join([_heading(2, name), *(line for block in blocks for line in _block(block))])


def _heading(level: int, text: str) -> str:
    return f'<h{level} id="{slug(text)}">{_inline(text)}</h{level}>'


def _block(block: str) -> Iterator[str]:
    lines = block.split("\n")
    if block.startswith("### "):
        yield _heading(3, block[4:])
    elif block.startswith("|"):
        yield from _table(lines)
    elif block.startswith("- "):
        yield "<ul>"
        for item in re.split(r"^- ", block, flags=re.MULTILINE)[1:]:
            yield f"<li>{_inline(' '.join(item.split()))}</li>"
        yield "</ul>"
    else:
        yield f"<p>{_inline(' '.join(lines))}</p>"


def _table(lines: list[str]) -> Iterator[str]:
    rows = [[_inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
    head, *body = [row for row in rows if not set("".join(row)) <= set("-: ")]
    yield (
        "<table><thead><tr>"
        + "".join(f'<th scope="col">{cell}</th>' for cell in head)
        + "</tr></thead><tbody>"
    )
    for row in body:
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    yield "</tbody></table>"


def _inline(text: str) -> str:
    """Code stays as it is; elsewhere marks become tags."""
    parts = re.split(r"(`[^`]+`)", html.escape(text, quote=False))
    return "".join(_marked(group, code) for code, group in groupby(parts, lambda part: part.startswith("`")))


def _marked(parts: Iterator[str], code: bool) -> str:
    if code:
        return "".join(f"<code>{part.strip('`')}</code>" for part in parts)
    text = "".join(parts)
    for pattern, tag in _INLINE:
        text = pattern.sub(tag, text)
    return text


if __name__ == "__main__":
    page = Path(__file__).parent / "fleet_page" / "page" / "help.html"
    page.write_text(help_page(Path(sys.argv[1]).read_text("utf-8")), "utf-8")
