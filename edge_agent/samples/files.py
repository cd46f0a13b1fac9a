"""Rows in files: read once, or watched for more."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from edge_agent.config import DataConfig
from edge_agent.samples.identities import Identities
from edge_agent.samples.rows import Format
from edge_agent.samples.sample import BrokenRow, Row, Sample
from edge_agent.samples.source import FIRST_INPUTS, NamesIn, NamingSource, listable, parser_for
from edge_agent.samples.tables import TableReader, is_dataset
from sidestream.backbone.inputs import Input
from sidestream.contract.errors import DataError
from sidestream.contract.spelling import Spellings

BLOCK_BYTES = 256 * 1024
_FORMATS: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
_TABLES = (".parquet", ".pq")
log = logging.getLogger(__name__)


class FileSource(NamingSource):
    """One file, or the files of one folder, read once or watched for more.

    Raises:
        DataError: the path does not exist, a column is unknown, or (unless watched) no row can be used.
    """

    def __init__(self, config: DataConfig, identities: Identities) -> None:
        super().__init__(config, identities)
        self._path = Path(config.path).expanduser()
        self._readers: dict[Path, _FileReader | TableReader] = {}
        self._refused: set[Path] = set()
        if not self._path.exists():
            raise DataError(f"data.path: there is no file or folder {self._path}")
        self._many = self._path.is_dir() and not is_dataset(self._path)
        self._labels: tuple[str, ...] | None = None
        self._first: Sequence[Input] = ()
        self._spellings = Spellings()
        self._survey(lambda label: ())

    @property
    def lacking(self) -> str:
        return next((found for reader in self._readers.values() if (found := reader.lacking)), "")

    def labels(self, names_in: NamesIn) -> tuple[str, ...]:
        if self._labels is None or self._config.watch:
            self._labels = self._survey(names_in)
        return self._labels

    def first_inputs(self) -> Sequence[Input]:
        return self._first

    def read(self) -> Iterator[Sample]:
        if any(reader.replaced() for reader in self._readers.values()):
            # Counting occurrences anew over everything keeps the keys of rows that were there before.
            log.info("%s: a file was replaced or cut; everything is read again", self._path)
            self._readers.clear()
            self._identities.forget()
        for path in self._files():
            for row in self._rows(path):
                yield self._identities.name(row)
        self.ended = not self._config.watch

    def _rows(self, path: Path) -> Iterator[Row | BrokenRow]:
        if path not in self._readers:
            self._readers[path] = reader_of(path, self._config)
        try:
            yield from self._readers[path].read_on(final=not self._config.watch)
        except DataError as exc:
            if not (self._many and self._config.watch):
                raise
            if path not in self._refused:
                log.error("%s (the file is left out)", exc)
            self._refused.add(path)

    def _files(self) -> list[Path]:
        if not self._many:
            return [self._path]
        try:
            found = sorted(path for path in self._path.iterdir() if self._is_data(path))
        except OSError as exc:
            raise DataError(f"{self._path}: cannot be listed: {exc.strerror}") from exc
        return [path for path in found if path not in self._refused]

    def _is_data(self, path: Path) -> bool:
        if self._config.format == "auto":
            return is_data_file(path)
        return not path.name.startswith(".") and path.is_file()

    def _survey(self, names_in: NamesIn) -> tuple[str, ...]:
        """Read everything once for its label names, and to find out early whether it can be read."""
        files = self._files()
        if not files and not self._config.watch:
            raise DataError(
                f"data.path: no .jsonl, .json, .csv, .tsv or .parquet file in folder {self._path}"
            )
        rows, labels, first, broken = 0, set[str](), list[Input](), ""
        for path in files:
            for row in self._rows(path):
                if isinstance(row, BrokenRow):
                    broken = broken or f", the first {row.why}"
                    continue
                rows += 1
                first += [row.input] if len(first) < FIRST_INPUTS and not row.is_blank else []
                if row.label is not None:
                    labels.update(names_in(row.label))
                    self._warn_of(row.label)
        if not rows and not self._config.watch:
            raise DataError(f"data.path: no usable row in {self._path}{broken}")
        self._readers.clear()
        self._first = first
        return listable(labels)

    def _warn_of(self, label: str) -> None:
        """Of labels in the data that look alike, or hold what is not seen; a list is many."""
        if not label.startswith("["):
            for odd in self._spellings.add([label], "the data"):
                log.warning("%s: %s", self._path, odd)


def is_data_file(path: Path) -> bool:
    """Whether its name says that there are rows in it."""
    return not path.name.startswith(".") and path.is_file() and _format_of(path) is not None


def reader_of(path: Path, config: DataConfig) -> _FileReader | TableReader:
    """What reads a file, or a saved dataset.

    Raises:
        DataError: its name does not say what it is, and no setting does.
        ConfigError: what reads it is not installed.
    """
    told = config.format
    kind = _format_of(path) if told == "auto" or told == "images" else told
    if path.is_dir() or kind == "parquet":
        return TableReader(path, config)
    if kind is None:
        raise DataError(
            f"data.path: {path} is neither .jsonl, .json, .csv, .tsv (.gz or not) nor .parquet by its name; "
            "set data.format"
        )
    return _FileReader(path, kind, config)


def _format_of(path: Path) -> Format | Literal["parquet"] | None:
    """By its name; None if that does not say."""
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    return "parquet" if suffix in _TABLES else _FORMATS.get(suffix)


class _FileReader:
    """One file and how far it has been read."""

    def __init__(self, path: Path, kind: Format, config: DataConfig) -> None:
        self._path = path
        self._parser = parser_for(str(path), kind, config)
        self._offset = 0
        self._inode = 0

    @property
    def lacking(self) -> str:
        """As a source's."""
        return self._parser.lacking

    def read_on(self, *, final: bool) -> Iterator[Row | BrokenRow]:
        """The rows that were appended since the last time."""
        try:
            with self._path.open("rb") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                file.seek(self._offset)
                while block := file.read(BLOCK_BYTES):
                    self._offset += len(block)
                    yield from self._parser.read(block)
        except FileNotFoundError as exc:
            if final:
                raise DataError(f"{self._path}: the file is gone") from exc
        except OSError as exc:
            raise DataError(f"{self._path}: cannot be read: {exc.strerror}") from exc
        if final:
            yield from self._parser.read(b"", final=True)

    def replaced(self) -> bool:
        """Whether the file is another one, or shorter, than the one read before."""
        try:
            now = self._path.stat()
        except OSError:
            return False
        return self._offset > 0 and (now.st_ino != self._inode or now.st_size < self._offset)


def read_rows(path: Path, config: DataConfig) -> list[Row]:
    """Every usable row of an evaluation file.

    Raises:
        DataError: it cannot be read, or has no usable row.
    """
    if not (path.is_file() or (path.is_dir() and is_dataset(path))):
        raise DataError(f"data.evaluation_path: there is no file {path}")
    found = list(reader_of(path, config).read_on(final=True))
    rows = [row for row in found if isinstance(row, Row) and not row.is_blank]
    if not rows:
        raise DataError(f"data.evaluation_path: no usable row in {path}")
    if left_out := len(found) - len(rows):
        log.warning("data.evaluation_path: %d of the %d rows of %s are not used", left_out, len(found), path)
    return rows
