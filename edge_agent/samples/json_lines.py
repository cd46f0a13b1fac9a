"""JSON as files hold it, to one object a line: lines, arrays, and whole documents. Knows no rows.

An array is cut as it comes, in bounded memory. A document that is one object is kept until it is whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from sidestream.contract.errors import DataError

_MAX_DOCUMENT_BYTES: Final = 64 * 1024 * 1024
_LONGEST_FIRST_LINE: Final = 1024 * 1024
_MARK: Final = re.compile(rb'["\\\[\]{},\r\n]')
_NAME: Final = re.compile(r"[\w.-]{1,32}")
_OPEN, _CLOSE = frozenset(b"[{"), frozenset(b"]}")


class JsonLines:
    """Of one file or stream.

    Args:
        name: The file, for messages.
        columns: Keys of which a row has one; an object with none of them, but with a list of objects, is a
            document that holds rows.
    """

    def __init__(self, name: str, columns: Collection[str]) -> None:
        self._name = name
        self._columns = columns
        self._head = b""
        self._take: Callable[[bytes, bool], bytes] | None = None

    def feed(self, data: bytes, *, final: bool = False) -> bytes:
        """The lines of a piece of UTF-8; with ``final``, of all that is left.

        Raises:
            DataError: it is a document that holds no rows, or one too large.
        """
        if self._take is None:
            self._head += data
            self._take = self._way(final)
            if self._take is None:
                return b""
            data, self._head = self._head, b""
        return self._take(data, final)

    def _way(self, final: bool) -> Callable[[bytes, bool], bytes] | None:
        """How to go on; None if that cannot be told yet."""
        head = self._head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head:
            return _as_it_is if final else None
        if head.startswith(b"["):
            return _Array().feed
        line, newline, _ = head.partition(b"\n")
        if not head.startswith(b"{") or len(head) > _LONGEST_FIRST_LINE:
            return _as_it_is
        if not (newline or final):
            return None
        try:
            first = json.loads(line)
        except (ValueError, RecursionError):
            # One object a line may well be broken; what breaks off after its bracket is a document.
            return _as_it_is if re.search(rb"[^\s{]", line) and not _unfinished(line) else self._document
        if _holds_columns(first):
            return self._document
        return _as_it_is if self._columns & first.keys() or not _rows_in(first) else self._document

    def _document(self, data: bytes, final: bool) -> bytes:
        self._head += data
        if len(self._head) > _MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{self._name}: is one JSON document of over {_MAX_DOCUMENT_BYTES >> 20} MiB: write an array "
                "of objects, or one object a line"
            )
        try:
            found = list(_objects(self._head.decode(errors="replace")))
        except (ValueError, RecursionError) as exc:
            if not final:
                return b""
            raise DataError(
                f"{self._name}: is neither one JSON object a line nor a JSON document ({exc})"
            ) from exc
        if not found:
            return b""
        rows = found if len(found) > 1 else _rows_in(found[0])
        rows = rows or (found if self._columns & found[0].keys() else [])
        if not rows:
            keys = ", ".join(key for key in list(found[0])[:10] if _NAME.fullmatch(key)) or "keys"
            raise DataError(
                f"{self._name}: is one JSON document, with {keys}, and no list of objects in it: write an "
                "array of objects, or one object a line"
            )
        self._head = b""
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class _Array:
    """Cuts an array at the commas between its elements."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes, final: bool) -> bytes:
        """One line for each element that is whole, and what there is of the next."""
        out, start, skip_to = bytearray(), 0, int(self._escaped)
        self._escaped = False
        for mark in _MARK.finditer(data):
            at, byte = mark.start(), data[mark.start()]
            if at < skip_to:
                continue
            if self._in_string:
                if byte == ord("\\"):
                    skip_to = at + 2
                    self._escaped = skip_to > len(data)
                self._in_string = byte != ord('"')
            elif byte == ord('"'):
                self._in_string = self._depth > 0
            elif byte in _OPEN:
                self._depth += 1
                start = at + 1 if self._depth == 1 else start
            elif byte in _CLOSE or (byte == ord(",") and self._depth == 1):
                self._depth -= byte in _CLOSE and self._depth > 0
                if self._depth == 0 or byte == ord(","):
                    out += data[start:at] + b"\n"
                    start = at + 1
            elif byte in b"\r\n" and self._depth:
                out += data[start:at] + b" "
                start = at + 1
        return bytes(out + data[start:]) if self._depth else bytes(out)


def _as_it_is(data: bytes, final: bool) -> bytes:
    return data


def _unfinished(line: bytes) -> bool:
    """Whether a line breaks off where the next one may go on."""
    return line.rstrip().endswith((b"{", b"[", b",", b":"))


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Objects that stand one after the other.

    Raises:
        ValueError: it is something else.
    """
    decoder, at = json.JSONDecoder(), 0
    while (at := len(text) - len(text[at:].lstrip())) < len(text):
        found, at = decoder.raw_decode(text, at)
        if not isinstance(found, dict):
            raise ValueError("not an object")
        yield found


def _holds_columns(document: dict[str, Any]) -> bool:
    """Whether an object in a line is no row of words but a document of columns: words hold no spaces."""
    lists = [value for value in document.values() if isinstance(value, list)]
    spaces = any(isinstance(word, str) and len(word.split()) > 1 for value in lists for word in value)
    return spaces and len(lists) == len(document) and bool(_rows_in(document))


def _rows_in(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a document holds: its one list of objects, or its columns of equal length."""
    lists = [value for value in document.values() if isinstance(value, list) and value]
    of_objects = [one for one in lists if all(isinstance(row, dict) for row in one)]
    if len(of_objects) == 1:
        return of_objects[0]
    if len(lists) > 1 and len({len(one) for one in lists}) == 1 and len(lists) == len(document):
        return [dict(zip(document, row, strict=True)) for row in zip(*lists, strict=True)]
    return []
