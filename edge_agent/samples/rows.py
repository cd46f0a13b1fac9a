"""JSON, CSV and TSV from bytes to rows, piece by piece. Knows no files: whoever feeds it reads them.

A row is given out once it is complete; the rest waits for more bytes. A broken row is told of as such. A
wrong column name is an error, because no row would be usable. TSV knows no quotes, CSV those of RFC 4180.
What columns are cut at shows in the header: whatever gives the columns that are wanted.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from edge_agent.samples.decoding import AUTO, Decoder
from edge_agent.samples.json_lines import JsonLines
from edge_agent.samples.sample import BrokenRow, Row
from sidestream.contract.errors import DataError
from sidestream.contract.spelling import normal

MAX_ROW_BYTES = 1024 * 1024
_USUAL = {"_text_column": "text", "_label_column": "label"}
_PROMPTED = {"prompt", "completion"}  # instead of a text, for a language model
_SHOWN = 3  # broken rows that are told of one by one
_NAME = re.compile(r"[^\W\d][\w.-]{0,31}")  # what looks like a column's name
_BOM = b"\xef\xbb\xbf"
_DELIMITERS = (",", ";", "\t", "|")
Format: TypeAlias = Literal["jsonl", "csv", "tsv"]
log = logging.getLogger(__name__)


class _Broken(Exception):  # noqa: N818  (it never leaves this file)
    """Why a row cannot be used."""


class RowParser:
    """Turns the bytes of one file into rows.

    Args:
        name: The file, for messages.
        kind: How rows are written.
        text_column: Column or key of the text.
        label_column: Column or key of the label; empty if there is none.
        pair_column: Column or key of a second text; rows need not have it.
        delimiter: What stands between columns; empty to find it.
        encoding: What the bytes are in.
    """

    def __init__(
        self,
        name: str,
        kind: Format,
        text_column: str,
        label_column: str,
        pair_column: str = "",
        *,
        delimiter: str = "",
        encoding: str = AUTO,
    ) -> None:
        self.name = name
        self.rows = 0
        """Usable rows given out."""
        self.broken = 0
        """Rows skipped."""
        self.lacking = ""
        """In words: which column was looked for, where the first object has no label."""
        self._kind = kind
        self._decoder = Decoder(name, encoding)
        self._json = JsonLines(name, {text_column, *_PROMPTED, "tokens"}) if kind == "jsonl" else None
        self._delimiter = delimiter
        self._text_column = text_column
        self._label_column = label_column
        self._pair_column = pair_column
        self._names: list[str] | None = None  # the header; of JSONL, the first object's keys
        self._tail = b""
        self._line = 1
        self._at_start = True
        self._skipping = False  # inside a row that is longer than any may be

    def feed(self, data: bytes, *, final: bool = False) -> Iterator[Row]:
        """The usable ones of the rows that :meth:`read` gives out."""
        return (row for row in self.read(data, final=final) if isinstance(row, Row))

    def read(self, data: bytes, *, final: bool = False) -> Iterator[Row | BrokenRow]:
        """Give out the rows that ``data`` completes; with ``final``, whatever is left counts as complete.

        Raises:
            DataError: a column is missing from the header (JSONL: from the first object).
        """
        data = self._decoder.feed(data, final=final)
        if self._json is not None:
            data = self._json.feed(data, final=final)
        lines = self._take_lines(data, final)
        at = 0
        while at < len(lines):
            row, used = self._read_row(lines, at, final)
            if not used:
                break
            at += used
            self._line += used
            if row is not None:
                self.rows += isinstance(row, Row)
                yield row
        if (too_long := self._keep(b"".join(lines[at:]) + self._tail)) is not None:
            yield too_long

    def _take_lines(self, data: bytes, final: bool) -> list[bytes]:
        """Complete lines, their ends included; what follows the last one becomes the tail."""
        buffer = self._tail + data
        if self._at_start and (len(buffer) >= len(_BOM) or final):
            self._at_start = False
            buffer = buffer.removeprefix(_BOM)
        end = len(buffer) if final else buffer.rfind(b"\n") + 1
        self._tail = buffer[end:]
        lines = buffer[:end].splitlines(keepends=True)
        if lines and self._skipping:
            self._skipping = False
            self._line += 1
            del lines[0]
        return lines

    def _keep(self, tail: bytes) -> BrokenRow | None:
        """Keep what is not complete; what is longer than any row may be is given out as broken, once."""
        self._tail = tail
        if len(tail) <= MAX_ROW_BYTES:
            return None
        known, self._tail, self._skipping = self._skipping, b"", True
        return None if known else self._report(f"longer than {MAX_ROW_BYTES} bytes", tail[:MAX_ROW_BYTES])

    def _read_row(self, lines: Sequence[bytes], at: int, final: bool) -> tuple[Row | BrokenRow | None, int]:
        """The row that starts at a line, if it is one, and how many lines it takes; 0 if it goes on."""
        if not lines[at].strip():
            return None, 1
        try:
            if self._kind == "jsonl":
                return self._from_json(_text(lines[at])), 1
            if not self._delimiter:
                self._delimiter = self._found_delimiter(_text(lines[at]))
            if self._kind == "tsv" and self._delimiter == "\t":
                return self._from_cells(_tsv_cells(lines[at])), 1
            cells, used = _csv_cells(lines, at, final, self._delimiter)
            return (self._from_cells(cells) if used else None), used
        except _Broken as broken:
            return self._report(str(broken), lines[at]), 1

    def _from_json(self, line: str) -> Row:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise _Broken(f"not JSON: {exc}") from exc
        if not isinstance(value, dict):
            raise _Broken("not a JSON object")
        if self._names is None:
            self._learn_names(list(value))
        return self._usable(value)

    def _from_cells(self, cells: list[str]) -> Row | None:
        if self._names is None:
            self._learn_names([cell.strip() for cell in cells])
            return None
        if len(cells) != len(self._names):
            raise _Broken(f"{len(cells)} fields where the header has {len(self._names)}")
        return self._usable(dict(zip(self._names, cells, strict=True)))

    def take(self, named: Mapping[str, Any]) -> Row | BrokenRow:
        """A row by its columns' names, counted as those that are read from bytes."""
        self._line += 1
        try:
            row = self._usable(named)
        except _Broken as broken:
            return self._report(str(broken), repr(sorted(named.items())).encode(errors="replace"))
        self.rows += 1
        return row

    def learn_columns(self, names: list[str]) -> None:
        """Which columns there are.

        Raises:
            DataError: one is missing.
        """
        self._learn_names(names)

    @property
    def columns(self) -> set[str]:
        """Columns that matter."""
        return {self._text_column, self._label_column, self._pair_column, *_PROMPTED} - {""}

    def row(self, named: Mapping[str, Any]) -> Row:
        """A row by its columns' names.

        Raises:
            DataError: it has no text, or a label that is none.
        """
        try:
            return self._usable(named)
        except _Broken as broken:
            raise DataError(f"{self.name}: {broken}") from broken

    def _usable(self, named: Mapping[str, Any]) -> Row:
        text, pair = named.get(self._text_column), named.get(self._pair_column)
        label = named.get(self._label_column)
        if text is None and self._text_column == _USUAL["_text_column"] and named.keys() >= _PROMPTED:
            return Row((_text_of(named["prompt"]), _text_of(named["completion"])), None)
        first = _text_of(text)
        return Row(
            first if pair is None or pair == "" else (first, _text_of(pair)),
            None if label is None else _label_of(label) or None,
        )

    def _learn_names(self, names: list[str]) -> None:
        for usual, of_words in (("_text_column", "tokens"), ("_label_column", "labels")):
            if getattr(self, usual) == _USUAL[usual] and _USUAL[usual] not in names and of_words in names:
                setattr(self, usual, of_words)
        if self._text_column == _USUAL["_text_column"] and {*names} >= _PROMPTED:
            self._names = names
            return
        wanted = (("data.text_column", self._text_column), ("data.label_column", self._label_column))
        for field, column in wanted:
            if column and column not in names:
                # Without a header, the first line is data, and an error must not quote that.
                shown = (name if _NAME.fullmatch(name) else "…" for name in names[:20])
                self._on_missing(field, column, f"it has: {', '.join(shown)}")
        self._names = names

    def _on_missing(self, field: str, column: str, there: str) -> None:
        """An object may lack a label where others have one; a header speaks for all rows."""
        if self._kind == "jsonl" and field == "data.label_column":
            self.lacking = f"{self.name}: the first object has no {column!r} ({there})"
            return
        hint = '; write "" if rows have no labels' if field == "data.label_column" else ""
        if there == "it has: …":
            hint = f"; if its columns are cut at something else than {self._delimiter!r}, set data.delimiter"
        raise DataError(f"{field}: no column {column!r} in {self.name}; {there}{hint}")

    def _found_delimiter(self, header: str) -> str:
        """What gives the columns that are wanted; else most columns; else what is usual."""
        usual = {"csv": ",", "tsv": "\t"}.get(self._kind, ",")

        def worth(delimiter: str) -> tuple[int, int, bool]:
            names = [
                cell.strip() for cell in next(csv.reader([header.strip("\r\n")], delimiter=delimiter), [])
            ]
            text = bool({self._text_column, "tokens"} & {*names}) or {*names} >= _PROMPTED
            label = not self._label_column or bool({self._label_column, "labels"} & {*names})
            return text + label, len(names), delimiter == usual

        best = max((usual, *(one for one in _DELIMITERS if one != usual)), key=worth)
        if best != usual:
            log.info("%s: its columns are cut at %r", self.name, best)
        return best

    def _report(self, reason: str, content: bytes) -> BrokenRow:
        self.broken += 1
        if self.broken <= _SHOWN:
            more = "; further ones are only counted" if self.broken == _SHOWN else ""
            log.warning("%s, line %d: %s: row skipped%s", self.name, self._line, reason[:200], more)
        return BrokenRow(hashlib.blake2b(content, digest_size=16).digest(), reason[:200])


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as exc:
        raise _Broken("not in the encoding that it should be (set data.encoding, such as cp1252)") from exc


def _tsv_cells(line: bytes) -> list[str]:
    return _text(line).rstrip("\r\n").split("\t")


def _csv_cells(lines: Sequence[bytes], at: int, final: bool, delimiter: str) -> tuple[list[str], int]:
    """The cells of the record that starts at a line, and its lines; 0 lines if a quoted field goes on."""
    used = 0

    def following() -> Iterator[str]:
        nonlocal used
        for index in range(at, len(lines)):
            used += 1
            yield _text(lines[index])

    try:
        return next(csv.reader(following(), strict=True, delimiter=delimiter)), used
    except csv.Error as exc:
        if "unexpected end" not in str(exc):
            raise _Broken(str(exc)) from exc
        if final:
            raise _Broken("a quoted field never ends") from exc
        return [], 0


def _text_of(value: Any) -> str:
    """A text; of a list of words, the words with a space between."""
    if isinstance(value, list):
        words = [_plain(word) for word in value]
        if any(not word or word.split() != [word] for word in words):
            raise _Broken("a word is empty or holds white space")
        return " ".join(words)
    if not isinstance(value, str | int | float):
        raise _Broken("no text in the text column")
    return _plain(value)


def _label_of(value: Any) -> str:
    """A label as one piece of text: a list stays JSON."""
    if isinstance(value, list):
        if any(isinstance(name, dict | list) or name is None for name in value):
            raise _Broken("a label list holds names only")
        return json.dumps([_name_of(name) for name in value], ensure_ascii=False)
    return _name_of(value)


def _name_of(value: Any) -> str:
    """A label's name: what is equal in Unicode's normal form is one label."""
    return normal(_plain(value))


def _plain(value: Any) -> str:
    """A scalar as text that UTF-8 can write (JSON can hold lone surrogates)."""
    if isinstance(value, dict | list):
        raise _Broken("an object, or a list within a list, is no text and no label")
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode(errors="replace").decode()
