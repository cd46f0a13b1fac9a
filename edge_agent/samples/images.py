"""Images in a folder, the sub-folder being the label, or in a list of paths; read once, or watched for more.

A watched file is taken up once two looks at it in a row have found it the same: a camera may still be writing
it. A file that changes later is another image, and a sample of its own. Equal files with equal labels are one
sample, under whatever name: a folder that is sorted or renamed while it is watched brings nothing twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from edge_agent.config import DataConfig
from edge_agent.samples.files import FileSource, is_data_file, reader_of
from edge_agent.samples.identities import Identities
from edge_agent.samples.sample import BrokenRow, Row, Sample
from edge_agent.samples.source import NamesIn, SampleSource, listable
from edge_agent.samples.tables import is_dataset
from sidestream.backbone.images.decoding import SUFFIXES, image_at
from sidestream.backbone.inputs import Input, digest_of
from sidestream.contract.errors import DataError
from sidestream.contract.spelling import Spellings, normal
from sidestream.contract.tasks import Modality

_SHOWN: Final = 3
log = logging.getLogger(__name__)


class _Listed(NamedTuple):
    """A file that is said to be an image."""

    path: Path
    label: str | None


class _Stamp(NamedTuple):
    """What tells that a file is as it was."""

    size: int
    modified_ns: int
    inode: int


class _Listing(Protocol):
    """Says which files there are."""

    def files(self) -> Iterator[_Listed]:
        """Every one, at each call anew.

        Raises:
            DataError: they cannot be listed.
        """

    def broken(self) -> Iterator[BrokenRow]:
        """Rows, since the last call, that name none."""

    def close(self) -> None:
        """Let go of what listing took."""


class ImageSource(SampleSource):
    """Image files, by whatever lists them.

    Args:
        config: The settings.
        folder: Where it may keep what does not belong into memory.
        watch: Whether to look for more, and to wait for files that are being written.

    Raises:
        DataError: there is no such folder or list, or (unless watched) no image.
    """

    modality = Modality.IMAGE

    def __init__(self, config: DataConfig, folder: Path | None = None, *, watch: bool | None = None) -> None:
        self.ended = False
        self._watch = config.watch if watch is None else watch
        self._path = Path(config.path).expanduser()
        self._listing = _listing(config, folder, watch=self._watch)
        self._seen: dict[Path, _Stamp] = {}
        """As each file was at the last look."""
        self._done: dict[Path, tuple[_Stamp, str | None]] = {}
        """As each was when it was given out, and its label."""
        self._troubled: set[Path] = set()
        self._spellings = Spellings()
        if not self._watch and not any(True for _ in self._listing.files()):
            raise DataError(
                f"data.path: no image in {self._path} (by their names: {', '.join(sorted(SUFFIXES))})"
            )

    def labels(self, names_in: NamesIn) -> tuple[str, ...]:
        found = {one.label for one in self._listing.files() if one.label}
        for odd in self._spellings.add(sorted(found), "the data"):
            log.warning("%s: %s", self._path, odd)
        return listable({name for label in found for name in names_in(label)})

    def first_inputs(self) -> Sequence[Input]:
        return ()

    def read(self) -> Iterator[Sample]:
        for row in self._listing.broken():
            yield Sample("", None, _key(b"broken", row.content, None), broken=True)
        for one in self._listing.files():
            if (sample := self._look(one)) is not None:
                yield sample
        self.ended = not self._watch

    def close(self) -> None:
        self._listing.close()

    def _look(self, one: _Listed) -> Sample | None:
        """A sample, if the file is there, whole as far as can be told, and not given out as it is."""
        try:
            about = one.path.stat()
        except OSError as exc:
            return self._gone(one, exc)
        stamp = _Stamp(about.st_size, about.st_mtime_ns, about.st_ino)
        settled = not self._watch or self._seen.get(one.path) == stamp
        self._seen[one.path] = stamp
        if not settled or self._done.get(one.path) == (stamp, one.label):
            return None
        try:
            image = image_at(one.path)
        except DataError as exc:
            self._tell(one.path, str(exc))
            return None if self._watch else _broken(one)
        self._done[one.path] = stamp, one.label
        return Sample(image, one.label, _key(b"image", image.digest, one.label))

    def _gone(self, one: _Listed, error: OSError) -> Sample | None:
        """Of a file that is listed and not there: it may yet come, where it is watched."""
        self._seen.pop(one.path, None)
        later = "; it is waited for" if self._watch else ""
        self._tell(one.path, f"{one.path}: is listed, and cannot be read: {error.strerror}{later}")
        return None if self._watch else _broken(one)

    def _tell(self, path: Path, why: str) -> None:
        if path in self._troubled or len(self._troubled) > _SHOWN:
            return
        self._troubled.add(path)
        log.warning("%s%s", why, "; further ones are not named" if len(self._troubled) > _SHOWN else "")


def holds_images(path: str, format_: str) -> bool:
    """Whether the settings say that there are images, or, if they leave it open, what is there does."""
    folder = Path(path).expanduser()
    if format_ != "auto" or not folder.is_dir() or is_dataset(folder):
        return format_ == "images"
    return not any(map(is_data_file, folder.iterdir())) and any(map(_is_image, _walk(folder)))


def read_image_rows(path: Path, config: DataConfig) -> list[Row]:
    """Every image of a folder or list, with its label; what cannot be read is left out, and told.

    Raises:
        DataError: there is none.
    """
    config = msgspec.structs.replace(config, path=str(path), watch=False)
    with contextlib.closing(ImageSource(config)) as source:
        return [sample.row for sample in source.read() if not sample.broken]


class _Folder:
    """Images in a folder and below; the first sub-folder on the way to one is its label."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if others := [path for path in _walk(path) if not _is_image(path)]:
            log.warning(
                "%s: %d files are left out, for their names are no image's, such as %s",
                *(path, len(others), others[0].name),
            )

    def files(self) -> Iterator[_Listed]:
        for path in filter(_is_image, _walk(self._path)):
            parts = path.relative_to(self._path).parts
            name = parts[0].encode(errors="replace").decode()
            yield _Listed(path, normal(name) if len(parts) > 1 else None)

    def broken(self) -> Iterator[BrokenRow]:
        return iter(())

    def close(self) -> None:
        return


class _PathList:
    """Images that the rows of a CSV, TSV or JSONL file name, relative to its folder."""

    def __init__(self, config: DataConfig, folder: Path | None, *, watch: bool) -> None:
        self._root = Path(config.path).expanduser().absolute().parent
        columns = msgspec.structs.replace(
            config, format="auto", text_column=config.image_column, text_pair_column="", watch=watch
        )
        self._rows = FileSource(columns, Identities(folder))
        self._listed: dict[_Listed, None] = {}
        self._broken: list[BrokenRow] = []

    def files(self) -> Iterator[_Listed]:
        for sample in self._rows.read():
            if sample.broken or sample.row.is_blank:
                self._broken.append(BrokenRow(sample.key))
            else:
                self._listed[_Listed(self._root / sample.row.text.strip(), sample.label)] = None
        yield from list(self._listed)

    def broken(self) -> Iterator[BrokenRow]:
        broken, self._broken = self._broken, []
        return iter(broken)

    def close(self) -> None:
        self._rows.close()


def _listing(config: DataConfig, folder: Path | None, *, watch: bool) -> _Listing:
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise DataError(f"data.path: there is no folder of images, nor a list of them, at {path}")
    reader_of(path, msgspec.structs.replace(config, format="auto"))  # whether its name says what it is
    return _PathList(config, folder, watch=watch)


def _walk(folder: Path) -> Iterator[Path]:
    """Files in it and below, in order; what begins with a dot is somebody's work in progress."""

    def on_error(error: OSError) -> None:
        if str(error.filename) == str(folder):
            raise DataError(f"{folder}: cannot be listed: {error.strerror}") from error
        log.debug("%s: cannot be listed: %s", error.filename, error.strerror)  # gone while we looked

    for place, folders, names in os.walk(folder, onerror=on_error):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(place, name)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _broken(one: _Listed) -> Sample:
    content = digest_of(os.fsencode(one.path))
    return Sample("", None, _key(b"broken", content, one.label), broken=True)


def _key(kind: bytes, content: bytes, label: str | None) -> bytes:
    written = b"\0" if label is None else b"\1" + label.encode()
    return hashlib.blake2b(kind + b"\0" + content + written, digest_size=16).digest()
