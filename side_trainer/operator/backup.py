"""A copy of a trainer's state directory, of one moment, taken beside a running trainer or a stopped one.

To restore, put the copy in the state directory's place while no trainer runs.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
from pathlib import Path

from side_trainer.codebook_store import FOLDER as CODEBOOKS
from side_trainer.fold.checkpoint import newest_files
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.side_tuning.output_heads import FOLDER as HEADS
from sidestream.contract.errors import StateError
from sidestream.host.state_dir import make_private

_log = logging.getLogger(__name__)


def backup(state_dir: Path, out: Path) -> int:
    """Copy journal, checkpoints, output heads and codebooks into ``out``; return the records in the copy.

    ``out`` must not exist yet. Every record is read once, so a copy of a damaged journal is not made.

    Raises:
        StateError: if there is no journal, it is damaged, or the copy cannot be written.
    """
    if not (state_dir / FILE_NAME).exists():
        raise StateError(f"no journal in {state_dir}; give the trainer's state directory with --state-dir")
    try:
        out.mkdir(mode=0o700, parents=True)
        # Checkpoints first: a trainer may be going on, and none may lie after the journal's last record.
        for path in newest_files(state_dir):
            with contextlib.suppress(FileNotFoundError):  # a newer one has just taken its place
                shutil.copy2(path, out / path.name)
        _copy_journal(state_dir / FILE_NAME, out / FILE_NAME)
        for folder in (HEADS, CODEBOOKS):  # after the journal: those that it goes by are there by then
            if (state_dir / folder).is_dir():
                shutil.copytree(state_dir / folder, out / folder, ignore=shutil.ignore_patterns("*.tmp"))
        records = _read_through(out / FILE_NAME)
        _note(state_dir / FILE_NAME, out / FILE_NAME)
        make_private(out)  # what is copied from an older version's folder may have been open to others
        return records
    except FileExistsError as exc:
        raise StateError(f"{out} exists already; give a folder that does not with --out") from exc
    except OSError as exc:
        raise StateError(f"cannot write {out}: {exc.strerror or exc}; give another --out") from exc


def _copy_journal(source: Path, target: Path) -> None:
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as old,
            contextlib.closing(sqlite3.connect(target)) as new,
        ):
            old.backup(new)
    except sqlite3.Error as exc:
        raise StateError(f"journal {source} cannot be copied: {exc}") from exc


def _note(journal: Path, copy: Path) -> None:
    """Note in both, the running trainer's and the copy, up to where each stream is in a backup now."""
    try:
        with contextlib.closing(sqlite3.connect(copy)) as db:
            marks = db.execute("SELECT watermark, stream FROM streams").fetchall()
        for path in (copy, journal):  # the copy first: only what is surely in it may be let go
            with contextlib.closing(sqlite3.connect(path, timeout=10.0)) as db, db:
                db.execute("PRAGMA synchronous = FULL")
                db.executemany("UPDATE streams SET saved = max(saved, ?) WHERE stream = ?", marks)
                db.execute(
                    "INSERT INTO meta VALUES ('backups', '1') "
                    "ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1"
                )
    except sqlite3.Error as exc:
        _log.warning(
            "devices go on keeping what is in this backup: the journal cannot be told of it: %s", exc
        )


def _read_through(path: Path) -> int:
    journal = Journal(path, read_only=True)
    with contextlib.closing(journal):
        offset = 0
        while records := journal.read(offset, limit=64):
            offset = records[-1].offset
        journal.holding.check()
        return journal.tail
