"""Where samples come from: files, a folder, standard input, a plug-in.

Nothing here remembers across restarts: a source names every sample
(:mod:`edge_agent.samples.identities`) and leaves it to the outbox to know which were consumed.
"""

from __future__ import annotations

import os
import select
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from edge_agent.config import DataConfig
from edge_agent.samples.decoding import Decoder
from edge_agent.samples.files import BLOCK_BYTES, FileSource, read_rows
from edge_agent.samples.identities import Identities
from edge_agent.samples.images import ImageSource, holds_images, read_image_rows
from edge_agent.samples.rows import Format, RowParser
from edge_agent.samples.sample import BrokenRow, Row, Sample
from edge_agent.samples.source import (
    FIRST_INPUTS,
    NamesIn,
    NamingSource,
    NoSource,
    SampleSource,
    listable,
    parser_for,
)
from sidestream.backbone.inputs import Input
from sidestream.contract.errors import ConfigError, DataError

_STDIN = "standard input"
PLUGIN_GROUP = "sidestream.sources"
_REGISTERED: dict[str, Callable[[DataConfig], Iterable[Any]]] = {}
_PEEKED_ROWS = 10_000  # of standard input, for its label names


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
    if holds_images(config.path, config.format):
        return ImageSource(config, folder)
    return FileSource(config, Identities(folder))


def read_evaluation(config: DataConfig, part: tuple[int, int]) -> list[Row]:
    """The device's share of the samples that the settings name for evaluation.

    Raises:
        DataError: they cannot be read, or there is no usable one.
    """
    path = Path(config.evaluation_path).expanduser()
    if not holds_images(config.evaluation_path, config.format):
        rows = read_rows(path, config)
    else:
        rows = read_image_rows(path, config)
    index, parts = part
    return rows[index::parts][: config.evaluation_max_samples]


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

    def first_inputs(self) -> Sequence[Input]:
        parsed = self._parsed  # the session's thread may be adding to it
        return [
            parsed[place].input
            for place in range(min(len(parsed), FIRST_INPUTS))
            if not parsed[place].row.is_blank
        ]

    def read(self) -> Iterator[Sample]:
        while True:
            while self._parsed:
                yield self._parsed.popleft()
            if not self._read_block():
                break
        if self._at_end and self._parser is not None and not self._parser.rows:
            raise DataError(f"{_STDIN}: no usable row")
        self.ended = self._at_end

    def give_back(self, samples: Sequence[Sample]) -> None:
        self._parsed.extendleft(reversed(samples))
        self.ended = False

    def _read_block(self) -> bool:
        """Take in what is there; False if that is nothing, or the end was reached before."""
        if self._at_end or not select.select([self._descriptor], [], [], 0.0)[0]:
            return False
        block = os.read(self._descriptor, BLOCK_BYTES)
        self._at_end = not block
        self._parsed.extend(self._identities.name(row) for row in self._feed(block))
        return True

    def _feed(self, block: bytes) -> Iterator[Row | BrokenRow]:
        if self._parser is None:
            self._head += block
            # What it is shows in its first line, decoded.
            shown = Decoder(_STDIN, self._config.encoding).feed(self._head, final=self._at_end)
            if b"\n" not in shown and not self._at_end:
                return iter(())
            block, kind = self._head, self._config.format
            if kind == "parquet":
                raise ConfigError("data.format", "parquet cannot be read from standard input; give a file")
            assert kind != "images"  # the settings refuse it
            found = _format_of(shown) if kind == "auto" else kind
            self._parser = parser_for(_STDIN, found, self._config)
        return self._parser.read(block, final=self._at_end)


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


def _format_of(head: bytes) -> Format:
    line = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0]
    if line.startswith((b"{", b"[")):
        return "jsonl"
    return "tsv" if b"\t" in line else "csv"


def register(name: str, factory: Callable[[DataConfig], Iterable[Any]]) -> None:
    """Make a plug-in known in this process, as an installed one is by its entry point."""
    _REGISTERED[name] = factory


def _find_plugin(name: str) -> Callable[[DataConfig], Iterable[Any]]:
    if name in _REGISTERED:
        return _REGISTERED[name]
    plugins = {point.name: point for point in entry_points(group=PLUGIN_GROUP)}
    if name not in plugins:
        known = ", ".join(sorted(plugins)) or "none"
        raise ConfigError("data.plugin", f"no plug-in {name!r} is installed; there are: {known}")
    try:
        factory: Callable[[DataConfig], Iterable[Any]] = plugins[name].load()
    except Exception as exc:
        raise ConfigError("data.plugin", f"{name!r} cannot be loaded: {exc}") from exc
    return factory
