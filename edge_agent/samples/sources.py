"""Where samples come from: files, a folder, standard input, a plug-in.

Nothing here remembers across restarts: a source names every sample
(:mod:`edge_agent.samples.identities`) and leaves it to the outbox to know which were consumed.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from edge_agent.config import DataConfig
from edge_agent.samples.identities import Identities
from edge_agent.samples.rows import Format, RowParser
from edge_agent.samples.sample import Row, Sample
from sidestream.backbone.text import Text
from sidestream.contract.errors import ConfigError, DataError
from sidestream.contract.messages import MAX_LABEL_CHARS, MAX_LABELS

PLUGIN_GROUP = "sidestream.sources"
_FORMATS: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
_BLOCK_BYTES = 256 * 1024
_PEEKED_ROWS = 10_000  # of standard input, for its label names
_FIRST = 64  # texts by which a tokenizer is judged
log = logging.getLogger(__name__)


NamesIn: TypeAlias = Callable[[str], Sequence[str]]


class SampleSource(Protocol):
    """Yields samples; asked again and again until it has ended."""

    ended: bool
    """Whether no sample can ever come again."""

    @property
    def lacking(self) -> str:
        """In words, what was looked for in vain where samples have no label; empty: nothing to say."""
        return ""

    def labels(self, names_in: NamesIn) -> tuple[str, ...]:
        """Label names in the data that is there now, sorted; none where it cannot be looked at beforehand.

        Asked before reading begins, perhaps several times. ``names_in`` takes a row's label apart.
        """

    def first_texts(self) -> Sequence[Text]:
        """A few inputs of the data that is there now; none where it cannot be looked at beforehand."""
        return ()

    def read(self) -> Iterator[Sample]:
        """The samples that are there now. Returns when there are none left for the moment.

        Raises:
            DataError: the data cannot be read.
        """

    def give_back(self, samples: Sequence[Sample]) -> None:
        """Take back samples that were read and not consumed, where they could not be read again."""
        return

    def close(self) -> None:
        """Let go of what reading took. Idempotent."""
        return


def open_source(config: DataConfig, folder: Path | None = None) -> SampleSource:
    """The source that the settings describe; whoever has read it closes it.

    Args:
        config: The settings.
        folder: Where it may keep what does not belong into memory; None for the system's place for that.

    Raises:
        DataError: there is no such file, or no row of it can be used.
        ConfigError: there is no such plug-in.
    """
    if config.plugin:
        return PluginSource(config, Identities(folder))
    if config.path == "-":
        return StreamSource(config, Identities(folder))
    if not config.path:
        return NoSource()
    return FileSource(config, Identities(folder))


class NamingSource(SampleSource):
    """A source with rows to name.

    Args:
        config: The settings.
        identities: Names the rows; it is closed with the source.
    """

    def __init__(self, config: DataConfig, identities: Identities) -> None:
        self.ended = False
        self._config = config
        self._identities = identities

    def close(self) -> None:
        self._identities.close()


class NoSource(SampleSource):
    """No data at all."""

    ended = True

    def labels(self, names_in: NamesIn) -> tuple[str, ...]:
        return ()

    def read(self) -> Iterator[Sample]:
        return iter(())


class FileSource(NamingSource):
    """One file, or the files of one folder, read once or watched for more.

    Raises:
        DataError: the path does not exist, a column is unknown, or (unless watched) no row can be used.
    """

    def __init__(self, config: DataConfig, identities: Identities) -> None:
        super().__init__(config, identities)
        self._path = Path(config.path).expanduser()
        self._readers: dict[Path, _FileReader] = {}
        self._refused: set[Path] = set()
        if not self._path.exists():
            raise DataError(f"data.path: there is no file or folder {self._path}")
        self._labels: tuple[str, ...] | None = None
        self._first: Sequence[Text] = ()
        self._survey(lambda label: ())

    @property
    def lacking(self) -> str:
        return next((found for reader in self._readers.values() if (found := reader.lacking)), "")

    def labels(self, names_in: NamesIn) -> tuple[str, ...]:
        if self._labels is None or self._config.watch:
            self._labels = self._survey(names_in)
        return self._labels

    def first_texts(self) -> Sequence[Text]:
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

    def _rows(self, path: Path) -> Iterator[Row]:
        if path not in self._readers:
            self._readers[path] = _FileReader(path, self._config)
        try:
            yield from self._readers[path].read_on(final=not self._config.watch)
        except DataError as exc:
            if not (self._path.is_dir() and self._config.watch):
                raise
            if path not in self._refused:
                log.error("%s (the file is left out)", exc)
            self._refused.add(path)

    def _files(self) -> list[Path]:
        if not self._path.is_dir():
            return [self._path]
        try:
            found = sorted(path for path in self._path.iterdir() if self._is_data(path))
        except OSError as exc:
            raise DataError(f"{self._path}: cannot be listed: {exc.strerror}") from exc
        return [path for path in found if path not in self._refused]

    def _is_data(self, path: Path) -> bool:
        if path.name.startswith(".") or not path.is_file():
            return False
        return self._config.format != "auto" or path.suffix.lower() in _FORMATS

    def _survey(self, names_in: NamesIn) -> tuple[str, ...]:
        """Read everything once for its label names, and to find out early whether it can be read."""
        files = self._files()
        if not files and not self._config.watch:
            raise DataError(f"data.path: no .jsonl, .csv or .tsv file in folder {self._path}")
        rows, labels, first = 0, set[str](), list[Text]()
        for path in files:
            for row in self._rows(path):
                rows += 1
                first += [row.input] if len(first) < _FIRST and row.text.strip() else []
                labels.update(names_in(row.label) if row.label is not None else ())
        if not rows and not self._config.watch:
            raise DataError(f"data.path: no usable row in {self._path}")
        self._readers.clear()
        self._first = first
        return listable(labels)


class _FileReader:
    """One file and how far it has been read."""

    def __init__(self, path: Path, config: DataConfig) -> None:
        kind = config.format if config.format != "auto" else _FORMATS.get(path.suffix.lower())
        if kind is None:
            raise DataError(
                f"data.path: {path} is neither .jsonl, .csv nor .tsv by its name; set data.format"
            )
        self._path = path
        self._parser = parser_for(str(path), kind, config)
        self._offset = 0
        self._inode = 0

    @property
    def lacking(self) -> str:
        """As a source's."""
        return self._parser.lacking

    def read_on(self, *, final: bool) -> Iterator[Row]:
        """The rows that were appended since the last time."""
        try:
            with self._path.open("rb") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                file.seek(self._offset)
                while block := file.read(_BLOCK_BYTES):
                    self._offset += len(block)
                    yield from self._parser.feed(block)
        except FileNotFoundError as exc:
            if final:
                raise DataError(f"{self._path}: the file is gone") from exc
        except OSError as exc:
            raise DataError(f"{self._path}: cannot be read: {exc.strerror}") from exc
        if final:
            yield from self._parser.feed(b"", final=True)

    def replaced(self) -> bool:
        """Whether the file is another one, or shorter, than the one read before."""
        try:
            now = self._path.stat()
        except OSError:
            return False
        return self._offset > 0 and (now.st_ino != self._inode or now.st_size < self._offset)


class StreamSource(NamingSource):
    """Rows piped into standard input. Reading never blocks, so that the agent can be stopped.

    What was piped in cannot be read twice: one source serves all of an agent's sessions.
    """

    def __init__(self, config: DataConfig, identities: Identities, descriptor: int | None = None) -> None:
        super().__init__(config, identities)
        self._descriptor = sys.stdin.fileno() if descriptor is None else descriptor
        self._parser: RowParser | None = None
        self._head = b""
        self._parsed: deque[Sample] = deque()
        self._at_end = False

    @property
    def lacking(self) -> str:
        return self._parser.lacking if self._parser is not None else ""

    def labels(self, names_in: NamesIn) -> tuple[str, ...]:
        while len(self._parsed) < _PEEKED_ROWS and self._read_block():
            pass
        labels = {sample.label for sample in self._parsed if sample.label}
        return listable({name for label in labels for name in names_in(label)})

    def first_texts(self) -> Sequence[Text]:
        parsed = self._parsed  # the session's thread may be adding to it
        return [
            parsed[place].row.input for place in range(min(len(parsed), _FIRST)) if parsed[place].text.strip()
        ]

    def read(self) -> Iterator[Sample]:
        while True:
            while self._parsed:
                yield self._parsed.popleft()
            if not self._read_block():
                break
        if self._at_end and self._parser is not None and not self._parser.rows:
            raise DataError("standard input: no usable row")
        self.ended = self._at_end

    def give_back(self, samples: Sequence[Sample]) -> None:
        self._parsed.extendleft(reversed(samples))
        self.ended = False

    def _read_block(self) -> bool:
        """Take in what is there; False if that is nothing, or the end was reached before."""
        if self._at_end or not select.select([self._descriptor], [], [], 0.0)[0]:
            return False
        block = os.read(self._descriptor, _BLOCK_BYTES)
        self._at_end = not block
        self._parsed.extend(self._identities.name(row) for row in self._feed(block))
        return True

    def _feed(self, block: bytes) -> Iterator[Row]:
        if self._parser is None:
            self._head += block
            if b"\n" not in self._head and not self._at_end:
                return iter(())
            block, kind = self._head, self._config.format
            found = _format_of(block) if kind == "auto" else kind
            self._parser = parser_for("standard input", found, self._config)
        return self._parser.feed(block, final=self._at_end)


class PluginSource(NamingSource):
    """Samples from an installed plug-in: ``factory(DataConfig)`` gives an iterable of rows.

    A row is ``(text, label)``, or a mapping with the configured columns.
    """

    def __init__(self, config: DataConfig, identities: Identities) -> None:
        super().__init__(config, identities)
        self._factory = _find_plugin(config.plugin)

    def labels(self, names_in: NamesIn) -> tuple[str, ...]:
        return ()

    def read(self) -> Iterator[Sample]:
        try:
            for item in self._factory(self._config):
                yield self._identities.name(self._row(item))
        except DataError:
            raise
        except Exception as exc:
            raise DataError(f"plug-in {self._config.plugin!r}: {type(exc).__name__}: {exc}") from exc
        self.ended = True

    def _row(self, item: Any) -> Row:
        config = self._config
        if not isinstance(item, Mapping):
            text, label = item
            item = {config.text_column: text, config.label_column: label}
        return parser_for("plug-in", "jsonl", config).row(item)


def read_evaluation(config: DataConfig, part: tuple[int, int]) -> list[Row]:
    """The device's share of the evaluation file.

    Raises:
        DataError: it cannot be read, or has no usable row.
    """
    path = Path(config.evaluation_path).expanduser()
    if not path.is_file():
        raise DataError(f"data.evaluation_path: there is no file {path}")
    index, parts = part
    rows = [row for row in _FileReader(path, config).read_on(final=True) if row.text.strip()]
    if not rows:
        raise DataError(f"data.evaluation_path: no usable row in {path}")
    return rows[index::parts][: config.evaluation_max_samples]


def listable(labels: Iterable[str]) -> tuple[str, ...]:
    """Label names in order, as a device's status may carry them; none if there are too many for a job."""
    names = sorted(label for label in labels if len(label) <= MAX_LABEL_CHARS)
    if len(names) > MAX_LABELS:
        log.warning("%d different labels in the data: too many to be announced", len(names))
        return ()
    return tuple(names)


def parser_for(name: str, kind: Format, config: DataConfig) -> RowParser:
    """A parser with the columns that the settings name."""
    return RowParser(name, kind, config.text_column, config.label_column, config.text_pair_column)


def _format_of(head: bytes) -> Format:
    line = head.lstrip().partition(b"\n")[0]
    if line.startswith(b"{"):
        return "jsonl"
    return "tsv" if b"\t" in line else "csv"


def _find_plugin(name: str) -> Callable[[DataConfig], Iterable[Any]]:
    plugins = {point.name: point for point in entry_points(group=PLUGIN_GROUP)}
    if name not in plugins:
        known = ", ".join(sorted(plugins)) or "none"
        raise ConfigError("data.plugin", f"no plug-in {name!r} is installed; there are: {known}")
    try:
        factory: Callable[[DataConfig], Iterable[Any]] = plugins[name].load()
    except Exception as exc:
        raise ConfigError("data.plugin", f"{name!r} cannot be loaded: {exc}") from exc
    return factory
