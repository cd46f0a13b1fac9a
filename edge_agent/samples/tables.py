"""Rows in Parquet files, and in folders that ``datasets`` saved, through pyarrow: an optional extra."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from edge_agent.config import DataConfig
from edge_agent.samples.rows import RowParser
from edge_agent.samples.sample import BrokenRow, Row
from sidestream.contract.errors import ConfigError, DataError

_STATE: Final = "state.json"
_INFO: Final = "dataset_info.json"
_SPLITS: Final = "dataset_dict.json"
_AT_ONCE: Final = 1000  # rows in memory


def is_dataset(folder: Path) -> bool:
    """Whether a folder is one that ``Dataset.save_to_disk`` wrote.

    Raises:
        DataError: it holds several of them, of which one has to be named.
    """
    if (folder / _SPLITS).is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{_STATE}"))) or "none"
        raise DataError(
            f"data.path: {folder} holds several splits: name one, as {folder}/SPLIT; it has: {splits}"
        )
    return (folder / _STATE).is_file() and (folder / _INFO).is_file()


class TableReader:
    """One Parquet file or saved dataset, read once, and again when it is replaced.

    Raises:
        ConfigError: pyarrow is not installed.
    """

    def __init__(self, path: Path, config: DataConfig) -> None:
        _arrow(path)
        self._path = path
        self._config = config
        self._parser = self._new_parser()
        self._seen: tuple[int, int, int] | None = None

    @property
    def lacking(self) -> str:
        """As a source's."""
        return self._parser.lacking

    def read_on(self, *, final: bool) -> Iterator[Row | BrokenRow]:
        """Its rows, the first time. A file that is still being written is looked at again, unless ``final``.

        Raises:
            DataError: it cannot be read, or lacks a column.
        """
        if self._seen is not None:
            return
        arrow = _arrow(self._path)
        try:
            seen = self._stamp()
            batches = self._dataset(arrow) if self._path.is_dir() else self._parquet()
            for named in batches:
                self._seen = seen
                yield self._parser.take(named)
            self._seen = seen
        except (OSError, ValueError, KeyError, arrow.ArrowException) as exc:
            if final or self._seen is not None:
                raise DataError(f"{self._path}: cannot be read: {str(exc).splitlines()[0]}") from exc

    def replaced(self) -> bool:
        """Whether it is another one than the one read before."""
        try:
            return self._seen is not None and self._stamp() != self._seen
        except OSError:
            return False

    def _stamp(self) -> tuple[int, int, int]:
        found = (self._path / _STATE if self._path.is_dir() else self._path).stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _parquet(self) -> Iterator[Mapping[str, Any]]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self._path) as file:
            about = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            names = self._names(file.schema_arrow.names, about.get("info", {}).get("features", {}))
            for batch in file.iter_batches(
                batch_size=_AT_ONCE, columns=self._wanted(file.schema_arrow.names)
            ):
                yield from _rows(batch.to_pylist(), names)

    def _dataset(self, arrow: Any) -> Iterator[Mapping[str, Any]]:
        state = json.loads((self._path / _STATE).read_text("utf-8"))
        features = json.loads((self._path / _INFO).read_text("utf-8")).get("features") or {}
        names = self._names(list(features), features)
        wanted = self._wanted(list(features))
        for one in state["_data_files"]:
            with (
                arrow.memory_map(str(self._path / Path(one["filename"]).name)) as file,
                arrow.ipc.open_stream(file) as stream,
            ):
                for batch in stream:
                    for start in range(0, batch.num_rows, _AT_ONCE):
                        yield from _rows(batch.select(wanted).slice(start, _AT_ONCE).to_pylist(), names)

    def _names(self, columns: list[str], features: Mapping[str, Any]) -> dict[str, list[str]]:
        """By column, the names of labels that are kept as numbers."""
        self._parser = self._new_parser()
        self._parser.learn_columns(columns)
        found = {column: _class_names(about) for column, about in features.items()}
        return {column: names for column, names in found.items() if names}

    def _wanted(self, columns: list[str]) -> list[str]:
        return [column for column in columns if column in self._parser.columns]

    def _new_parser(self) -> RowParser:
        config = self._config
        return RowParser(
            str(self._path), "csv", config.text_column, config.label_column, config.text_pair_column
        )


def _rows(rows: list[dict[str, Any]], names: Mapping[str, list[str]]) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        for column, known in names.items():
            if column in row:
                row[column] = _named(row[column], known)
        yield row


def _named(value: Any, names: list[str]) -> Any:
    """A label's number as its name; -1, by which ``datasets`` says that there is none, is none."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    if isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value


def _class_names(feature: Any) -> list[str]:
    """Of a ClassLabel, or a list of them."""
    if isinstance(feature, list) and len(feature) == 1:
        return _class_names(feature[0])
    if not isinstance(feature, dict):
        return []
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        return _class_names(feature.get("feature"))
    return [str(name) for name in feature["names"]] if feature.get("_type") == "ClassLabel" else []


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as exc:
        raise ConfigError(
            "data.path", f"{path} is a table: reading it takes pyarrow; pip install 'sidestream[data]'"
        ) from exc
    return pyarrow
