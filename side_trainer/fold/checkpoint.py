"""Checkpoints: where a restart picks the fold up, so that it need not begin at the first record.

A safetensors file each, written atomically, checked by digest when read. They save time, never data: with
none that can be read, the fold starts from the journal's beginning and arrives at the same bits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from safetensors import SafetensorError
from safetensors.numpy import load, save

from side_trainer.method import Arrays
from sidestream.contract.errors import DecodeError, StateError
from sidestream.contract.wire import prepared
from sidestream.host.state_dir import write_atomically
from sidestream.side_network.bundle import state_digest

if TYPE_CHECKING:  # status reads checkpoints, and loads no torch for that
    from side_trainer.fold.fold import Fold

_log = logging.getLogger(__name__)
_KEEP: Final = 2
_KEY: Final = "sidestream"
_NAME: Final = re.compile(r"checkpoint-([0-9]{12})\.safetensors")


@prepared
class CheckpointAbout(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint says of itself."""

    run: str
    """The journal it belongs to."""
    offset: int
    """The last record it includes."""
    updates: int
    """Optimiser updates up to there."""
    weights_digest: str
    """Of the side-network alone: what manifests carry and ``verify`` recomputes."""
    state_digest: str
    """Of everything in the file."""


@prepared
class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was read and found whole."""

    about: CheckpointAbout
    """What it is."""
    arrays: Arrays
    """As :meth:`side_trainer.fold.fold.Fold.state` gave them."""


def write_checkpoint(directory: Path, fold: Fold, run: str) -> CheckpointAbout:
    """Write the fold's state durably, then delete all but the last two checkpoints."""
    arrays = fold.state()
    about = CheckpointAbout(
        run=run,
        offset=fold.offset,
        updates=fold.updates,
        weights_digest=fold.digest(),
        state_digest=state_digest(arrays),
    )
    data = save(arrays, metadata={_KEY: msgspec.json.encode(about).decode()})
    write_atomically(directory / f"checkpoint-{fold.offset:012d}.safetensors", data)
    for path in (*newest_files(directory)[_KEEP:], *directory.glob("checkpoint-*.tmp")):
        path.unlink()
    return about


def checkpoints(directory: Path, run: str) -> Iterator[Checkpoint]:
    """The readable checkpoints of a run, newest first; a broken one is logged and passed over."""
    for path in newest_files(directory):
        try:
            checkpoint = _read(path)
        except (OSError, DecodeError) as exc:
            _log.warning("checkpoint %s cannot be used (%s); trying the one before", path.name, exc)
            continue
        if checkpoint.about.run == run:
            yield checkpoint


def newest_checkpoint(directory: Path, run: str) -> Checkpoint | None:
    """The newest checkpoint, which must be whole; None if there is none.

    Raises:
        StateError: if it is damaged, or of another journal.
    """
    for path in newest_files(directory)[:1]:
        try:
            checkpoint = _read(path)
        except (OSError, DecodeError) as exc:
            raise StateError(f"checkpoint {path} is damaged: {exc}") from exc
        if checkpoint.about.run != run:
            raise StateError(f"checkpoint {path} belongs to another journal")
        return checkpoint
    return None


def resume(directory: Path, fold: Fold, run: str, tail: int, *, least: int = 0) -> Checkpoint | None:
    """Bring a fresh fold to the newest usable checkpoint from an offset on; None if there is none."""
    for checkpoint in checkpoints(directory, run):
        if checkpoint.about.offset < least:
            continue
        if checkpoint.about.offset > tail:
            raise StateError(
                f"checkpoint at record {checkpoint.about.offset} lies after the journal's last, {tail}: the "
                f"journal in {directory} has lost records; restore it from a backup, or start a new state_dir"
            )
        fold.restore(checkpoint.about.offset, checkpoint.about.updates, checkpoint.arrays)
        return checkpoint
    return None


def newest_files(directory: Path) -> list[Path]:
    """The checkpoints' files, newest first."""
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)


def _read(path: Path) -> Checkpoint:
    return read_checkpoint(path.read_bytes())


def read_checkpoint(data: bytes) -> Checkpoint:
    """Read a checkpoint's file.

    Raises:
        DecodeError: it is none, or damaged.
    """
    try:
        header = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = msgspec.json.decode(header["__metadata__"][_KEY], type=CheckpointAbout)
        arrays = load(data)
    except (SafetensorError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as exc:
        raise DecodeError(f"not a checkpoint: {type(exc).__name__}") from exc
    if state_digest(arrays) != about.state_digest:
        raise DecodeError("its digest does not match its content")
    return Checkpoint(about=about, arrays=arrays)
