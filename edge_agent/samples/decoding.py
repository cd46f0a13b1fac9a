"""Bytes as they stand in a file to UTF-8: unpacked, and out of whatever encoding. Knows no files and no rows.

Piece by piece, in bounded memory. What no character can be read from becomes a byte that is no UTF-8: the row
it stands in is told of, and no other.
"""

from __future__ import annotations

import codecs
import zlib
from typing import Final

from sidestream.contract.errors import DataError

AUTO: Final = "auto"
_ENOUGH: Final = 64  # bytes by which a file shows what it is, unless its first line is shorter
_GZIP: Final = b"\x1f\x8b"
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHERS: Final = (
    (b"PAR1", "is Parquet: give it a name that ends in .parquet, or set data.format"),
    (b"PK\x03\x04", "is a ZIP archive, as spreadsheets are: unpack it, or save the sheet as CSV"),
    (b"BZh", "is packed by bzip2: unpack it, or pack it by gzip"),
    (b"\xfd7zXZ", "is packed by xz: unpack it, or pack it by gzip"),
    (b"\x28\xb5\x2f\xfd", "is packed by zstd: unpack it, or pack it by gzip"),
    (b"ARROW1", "is an Arrow file: save it as Parquet, or as a folder of datasets"),
    (b"%PDF", "is a PDF"),
    (b"\xd0\xcf\x11\xe0", "is an old spreadsheet: save the sheet as CSV"),
)
_UNREADABLE: Final = "sidestream.unreadable"
codecs.register_error(_UNREADABLE, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


class Decoder:
    """Of one file or stream.

    Args:
        name: The file, for messages.
        encoding: What it is in; ``auto`` goes by its mark, and takes UTF-8 where it has none.
    """

    def __init__(self, name: str, encoding: str = AUTO) -> None:
        self._name = name
        self._encoding = encoding
        self._head = b""
        self._gunzip: zlib._Decompress | None = None
        self._in_pack = False  # a packed piece has begun and not ended
        self._begun = False
        self._characters: codecs.IncrementalDecoder | None = None

    def feed(self, data: bytes, *, final: bool = False) -> bytes:
        """The UTF-8 of a piece; with ``final``, of all that is left.

        Raises:
            DataError: it is no text, or in an encoding that has to be named; the error says which.
        """
        if self._gunzip is None and not self._begun:
            self._head += data
            if not (_shows(self._head) or final):
                return b""
            data, self._head = self._head, b""
            if data.startswith(_GZIP):
                self._gunzip = zlib.decompressobj(31)
        if self._gunzip is not None:
            data = self._unpack(data)
            if final and self._in_pack:
                raise DataError(
                    f"{self._name}: is packed by gzip, and breaks off before its end: copy it anew"
                )
        return self._decode(data, final)

    def _unpack(self, data: bytes) -> bytes:
        unpacked = b""
        while data:
            assert self._gunzip is not None
            try:
                unpacked += self._gunzip.decompress(data)
            except zlib.error as exc:
                raise DataError(f"{self._name}: is packed by gzip, and damaged: {exc}") from exc
            data, self._in_pack = self._gunzip.unused_data, not self._gunzip.eof
            if self._gunzip.eof:  # what follows was appended, packed by itself
                self._gunzip = zlib.decompressobj(31)
                data = data.lstrip(b"\0")
        return unpacked

    def _decode(self, data: bytes, final: bool) -> bytes:
        if not self._begun:
            self._head += data
            if not self._head or not (_shows(self._head) or final):
                return b""
            data, self._head, self._begun = self._head, b"", True
            encoding = self._encoding_of(data)
            if encoding != "utf-8":
                self._characters = codecs.getincrementaldecoder(encoding)(_UNREADABLE)
        if self._characters is None:
            return data
        return self._characters.decode(data, final).encode("utf-8", "surrogatepass")

    def _encoding_of(self, head: bytes) -> str:
        if self._encoding != AUTO:
            return codecs.lookup(self._encoding).name
        for mark, encoding in _MARKS:
            if head.startswith(mark):
                return encoding
        for start, what in _OTHERS:
            if head.startswith(start):
                raise DataError(f"{self._name}: {what}")
        line = head[:_ENOUGH].partition(b"\n")[0]
        zeros = line.count(0), line[::2].count(0)
        if zeros[0] > len(line) // 3:
            guess = "utf-16-be" if zeros[1] > zeros[0] // 2 else "utf-16-le"
            raise DataError(
                f"{self._name}: seems to be UTF-16, without a mark that says so: set data.encoding = "
                f'"{guess}", or save it as UTF-8'
            )
        if zeros[0]:
            raise DataError(f"{self._name}: is no text file: it holds zero bytes")
        return "utf-8"


def _shows(head: bytes) -> bool:
    return len(head) >= _ENOUGH or b"\n" in head
