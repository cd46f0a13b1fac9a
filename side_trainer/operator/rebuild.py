"""The journal as if some devices had never been: what they sent is taken out, and everything is folded anew.

What that means exactly:

- The settings, labels, tiers and all other devices' batches stay, in their order. Facts that one of these
  devices was the first to show (a tier's depth) stay too: they say nothing of its data.
- What was chosen for these devices (``autotune``) goes, what was for others stays.
- What was learnt when is dropped, while idle and before: which rows were drawn depended on who had sent what
  by then. The trainer learns again from batch to batch, and makes its passes again at the end. So the weights
  are, to the bit, those of a job that received the same batches of the others in the same order before it
  learnt from any, and then went idle. In a split job the order of service stays, less what is taken out.
- Records get new numbers, for randomness derives from them. Weights versions count on from the highest one
  that was published, so that devices adopt what comes.
- Where batches were let go (``keep_days`` and the like), the fold begins at the snapshot that stands for
  them: what it has of these devices stays, and how many samples that is is said.
- What is taken out is kept as held batches, and the devices are excluded; releasing one brings it back, at
  the end. The old journal stays beside the new one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from side_trainer.fold.checkpoint import newest_files
from side_trainer.fold.retention import snapshot_of
from side_trainer.journal.file import digest_of
from side_trainer.journal.journal import FILE_NAME, Journal
from sidestream.contract.errors import ConfigError, StateError
from sidestream.contract.wire import prepared
from sidestream.host.state_dir import locked, prepare, touch_private

_log = logging.getLogger(__name__)
_NEW: Final = "journal.db.new"


@prepared
class Rebuilt(msgspec.Struct, frozen=True, kw_only=True):
    """What a rebuild did."""

    batches: int
    """Taken out."""
    samples: int
    """In them."""
    records: int
    """In the journal now."""
    version_base: int
    """The next versions are above this."""
    kept: str
    """The old journal."""
    beyond: int = 0
    """Samples of theirs that are not kept any more: what was learnt of them stays."""


def rebuild(state_dir: Path, without: Sequence[str]) -> Rebuilt:
    """Rebuild the journal in a state directory that no trainer is using.

    Raises:
        ConfigError: if the journal knows no such device.
        StateError: if the directory is in use, damaged, or cannot be written to.
    """
    if not (state_dir / FILE_NAME).exists():
        raise StateError(f"no journal in {state_dir}; give the trainer's state directory with --state-dir")
    with locked(prepare(state_dir), "a trainer"):
        with contextlib.closing(Journal(state_dir / FILE_NAME)) as journal:
            known = {stream.device for stream in journal.streams()}
            base = max(journal.highest, journal.version_base + journal.tail)
            snapshot = snapshot_of(journal)
            begins = 0 if snapshot is None else snapshot.about.offset
        for device in without:
            if device not in known:
                names = ", ".join(sorted(known)[:20]) or "none yet"
                raise ConfigError(
                    "--without", f"no batch of {device!r} is in the journal; there are: {names}"
                )
        try:
            return _swap(state_dir, without, base, begins)
        except (OSError, sqlite3.Error) as exc:
            raise StateError(f"the journal cannot be rebuilt, and stays as it was: {exc}") from exc


def _swap(state_dir: Path, without: Sequence[str], base: int, begins: int) -> Rebuilt:
    """Make the new journal beside the old one; it takes the old one's name once it is whole."""
    path, new = state_dir / FILE_NAME, state_dir / _NEW
    new.unlink(missing_ok=True)
    touch_private(new)
    with (
        contextlib.closing(sqlite3.connect(path)) as old,
        contextlib.closing(sqlite3.connect(new, isolation_level=None)) as db,
    ):
        old.backup(db)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        batches, samples, beyond = _take_out(db, without, base, begins)
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        records = db.execute("SELECT count(*) FROM records").fetchone()[0]
        old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for checkpoint in newest_files(state_dir):  # they are of another fold
        checkpoint.unlink()
    kept = state_dir / f"journal-before-{time.strftime('%Y%m%d-%H%M%S')}-{base}.db"
    os.link(path, kept)
    new.replace(path)
    return Rebuilt(
        batches=batches, samples=samples, records=records, version_base=base, kept=str(kept), beyond=beyond
    )


def _take_out(db: sqlite3.Connection, without: Sequence[str], base: int, begins: int) -> tuple[int, int, int]:
    marks = ",".join("?" * len(without))
    theirs = f"stream IN (SELECT stream FROM streams WHERE device IN ({marks}))"
    batches, samples = db.execute(
        f"SELECT count(*), coalesce(sum(samples), 0) FROM records WHERE {theirs}", without
    ).fetchone()
    ever = f"SELECT coalesce(sum(samples), 0) FROM streams WHERE device IN ({marks})"
    beyond = db.execute(ever, without).fetchone()[0] - samples
    db.execute(
        "INSERT INTO held (stream, sequence, tier, samples, kind, payload, digest) "
        "SELECT stream, sequence, tier, samples, kind, payload, digest FROM records "
        f"WHERE {theirs} ORDER BY offset",
        without,
    )
    learnt = "kind IN ('learn', 'idle', 'repeat', 'snapshot') AND offset > ?"
    db.execute(f"DELETE FROM records WHERE {learnt} OR {theirs}", (begins, *without))
    _forget_choices(db, without)
    _renumber(db, begins)
    db.execute(f"UPDATE streams SET batches = 0, samples = 0, bytes = 0 WHERE device IN ({marks})", without)
    for device in without:
        db.execute(
            "INSERT OR REPLACE INTO verdicts VALUES (?, 'excluded', 'rebuilt without it', ?)",
            (device, time.time()),
        )
    db.execute("INSERT OR REPLACE INTO meta VALUES ('version_base', ?)", (str(base),))
    return batches, samples, beyond


def _forget_choices(db: sqlite3.Connection, without: Sequence[str]) -> None:
    """Take out what was chosen for devices."""
    for offset, payload in db.execute(
        "SELECT offset, payload FROM records WHERE kind = 'assignment'"
    ).fetchall():
        if json.loads(payload)["device"] in without:
            db.execute("DELETE FROM records WHERE offset = ?", (offset,))


def _renumber(db: sqlite3.Connection, begins: int) -> None:
    """Close the gaps after the record that the fold begins at.

    Records that name others name what is left of them; a serve goes if nothing is.
    """
    kept = {offset for (offset,) in db.execute("SELECT offset FROM records")}
    for offset, kind, payload in db.execute(
        "SELECT offset, kind, payload FROM records WHERE kind IN ('serve', 'round')"
    ).fetchall():
        field = "offsets" if kind == "serve" else "uploads"
        named = json.loads(payload)[field]
        if kind == "serve" and not kept.intersection(named):  # rounds are counted, whoever took part
            db.execute("DELETE FROM records WHERE offset = ?", (offset,))
    places = {
        offset: place
        for place, (offset,) in enumerate(
            db.execute("SELECT offset FROM records WHERE offset > ? ORDER BY offset", (begins,)).fetchall(),
            start=begins + 1,
        )
    }
    # Ever lower numbers, one after another: no two records ever have the same one.
    for offset, place in places.items():
        db.execute("UPDATE records SET offset = ? WHERE offset = ?", (place, offset))
    for offset, kind, payload in db.execute(
        "SELECT offset, kind, payload FROM records WHERE kind IN ('serve', 'round')"
    ).fetchall():
        field, said = "offsets" if kind == "serve" else "uploads", json.loads(payload)
        said[field] = [places[one] for one in said[field] if one in places]
        written = json.dumps(said).encode()
        db.execute(
            "UPDATE records SET payload = ?, digest = ? WHERE offset = ?",
            (written, digest_of(written), offset),
        )
