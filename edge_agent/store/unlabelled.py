"""Samples without a label, and labels that came for them later: tables beside the outbox's, in its file.

A sample is put here in the transaction that consumes it, with its activations, and leaves in the one that
appends its batch. Labels stand in a table of their own, which the command line writes to while the agent
runs. Knows no tensors and no network.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from edge_agent.samples.sample import Row, Sample
from sidestream.backbone.inputs import from_kept, text_of, to_kept
from sidestream.contract.errors import DataError, StateError
from sidestream.contract.tasks import Task
from sidestream.host.state_dir import private

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS unlabelled (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, id TEXT NOT NULL UNIQUE,
    input TEXT NOT NULL, held_out INTEGER NOT NULL,
    state TEXT NOT NULL, made_by TEXT NOT NULL, bytes INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, activations BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS late_labels (
    key BLOB PRIMARY KEY, label TEXT NOT NULL, refused TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
"""
_LETTERS: Final = "bcdfghjkmnpqrstv"  # no digits, which a spreadsheet would take for a number, and no words
_ID_LETTERS: Final = 8
_ROW_BYTES: Final = 128
_TAKEN_UP: Final = "state = 'waiting' AND refused = ''"


class LabelChanged(Exception):  # noqa: N818  (nobody's fault: it is looked at again)
    """A label was corrected, or its sample dropped, while its batch was being made."""


class UnlabelledSample(NamedTuple):
    """A sample that waits for its label."""

    sample: Sample
    held_out: bool
    """Whether it is for evaluation once it has one."""
    made_by: str
    """What its activations were made by; with another backbone or other taps they are of no use."""
    activations: bytes
    again: bool = False
    """It waits already; only its activations are new."""


class Labelled(NamedTuple):
    """A sample whose label came."""

    key: bytes
    id: str
    row: Row
    held_out: bool
    activations: bytes


class Listed(NamedTuple):
    """A sample, for people."""

    id: str
    row: Row
    """Its label is the one that came; None if none did."""
    held_out: bool
    status: str
    """``waiting``, ``labelled``, ``refused``, ``sent`` or ``evaluation``."""
    reason: str
    """Why its label was refused."""


class UnlabelledStore:
    """What waits for labels, within a transaction of whoever has the connection.

    Args:
        db: Open on the outbox's file.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    # --- the agent ---------------------------------------------------------------------------------------

    def put(self, kept: Iterable[UnlabelledSample], max_bytes: int) -> int:
        """Put samples on the unlabelled store.

        Returns:
            How many without a label were dropped for want of room, the oldest first; those that are done with
            go before them and are not counted.
        """
        for one in kept:
            self._put(one)
        return self._make_room(max_bytes)

    def labelled(self, made_by: str, limit: int) -> list[Labelled]:
        """Samples whose labels came, in order, as far as their activations are of use."""
        found = self._db.execute(
            "SELECT u.key, id, input, label, held_out, activations FROM late_labels l "
            f"JOIN unlabelled u ON u.key = l.key JOIN kept k ON k.key = u.key "
            f"WHERE {_TAKEN_UP} AND made_by = ? ORDER BY number LIMIT ?",
            (made_by, limit),
        )
        return [
            Labelled(key, name, Row(from_kept(kept), label), bool(held_out), activations)
            for key, name, kept, label, held_out, activations in found.fetchall()
        ]

    def settle(self, labelled: Iterable[Labelled]) -> None:
        """These are in a batch, or, held out, among the samples for evaluation.

        Raises:
            LabelChanged: one of them has another label now; nothing may be committed.
        """
        for key, _, row, held_out, _ in labelled:
            state = "evaluation" if held_out else "sent"
            done = self._db.execute(
                "UPDATE unlabelled SET state = ?, bytes = ? WHERE key = ? AND state = 'waiting' "
                "AND key IN (SELECT key FROM late_labels WHERE key = ? AND label = ?)",
                (state, _size(row, b""), key, key, row.label),
            )
            if done.rowcount != 1:
                raise LabelChanged
            self._db.execute("DELETE FROM kept WHERE key = ?", (key,))
            if held_out:
                self._db.execute(
                    "INSERT OR IGNORE INTO held_out (key, input, label) VALUES (?, ?, ?)",
                    (key, to_kept(row.input), row.label),
                )

    def refuse(self, key: bytes, label: str, why: str) -> None:
        """A label is of no use; another one may come."""
        self._db.execute("UPDATE late_labels SET refused = ? WHERE key = ? AND label = ?", (why, key, label))

    def clear_stale(self, made_by: str) -> int:
        """Drop activations that were not made by this; the samples stay. Returns how many."""
        self._db.execute(
            "DELETE FROM kept WHERE key IN "
            "(SELECT key FROM unlabelled WHERE state = 'waiting' AND made_by != ?)",
            (made_by,),
        )
        return self._db.execute(
            "UPDATE unlabelled SET made_by = '' WHERE state = 'waiting' AND made_by NOT IN (?, '')",
            (made_by,),
        ).rowcount

    def without_activations(self) -> list[Sample]:
        """Samples whose activations are to be computed anew."""
        found = self._db.execute(
            "SELECT input, key FROM unlabelled WHERE state = 'waiting' AND made_by = '' ORDER BY number"
        )
        return [Sample(from_kept(kept), None, key) for kept, key in found.fetchall()]

    def drop(self, keys: Iterable[bytes]) -> None:
        """Forget samples, and their labels."""
        for key in keys:
            for table in ("unlabelled", "kept", "late_labels"):
                self._db.execute(f"DELETE FROM {table} WHERE key = ?", (key,))

    def waiting(self) -> int:
        """Samples without a label that is of use."""
        return self._count(f"state = 'waiting' AND NOT ({_HAS_LABEL})")

    def pending(self) -> int:
        """Samples whose labels have not been taken up yet."""
        return self._count(f"state = 'waiting' AND {_HAS_LABEL}")

    def labels(self) -> list[tuple[bytes, str]]:
        """Every label that came, by sample: they outlive the trainer's journal."""
        return self._db.execute("SELECT key, label FROM late_labels").fetchall()

    def take_over(self, labels: Iterable[tuple[bytes, str]]) -> None:
        """Labels that came while another journal was on."""
        self._db.executemany("INSERT OR REPLACE INTO late_labels (key, label) VALUES (?, ?)", labels)

    def set_job(self, task: Task, labels: Sequence[str]) -> None:
        """What labels are to be held against."""
        self._db.execute(
            "INSERT OR REPLACE INTO meta VALUES ('answers', ?)", (json.dumps([task.value, *labels]),)
        )

    # --- the command line --------------------------------------------------------------------------------

    def job(self) -> tuple[Task, Sequence[str]] | None:
        """What labels are to be held against, if that is known."""
        row = self._db.execute("SELECT value FROM meta WHERE name = 'answers'").fetchone()
        if row is None:
            return None
        task, *labels = json.loads(row[0])
        return Task(task), labels

    def text_of(self, name: str) -> str:
        """The text of a sample that may still be labelled.

        Raises:
            DataError: there is no such sample, or it is too late for it.
        """
        row = self._db.execute("SELECT input, state FROM unlabelled WHERE id = ?", (name,)).fetchone()
        if row is None:
            raise DataError(
                f"there is no sample {name[:40]!r}; sidestream agent samples lists those there are"
            )
        if row[1] == "sent":
            raise DataError(
                f"sample {name} is in a batch with its label: it is trained once, and cannot be taken back"
            )
        if row[1] != "waiting":
            raise DataError(f"sample {name} has its label already, and measures with it")
        return text_of(from_kept(row[0]))

    def label(self, name: str, label: str) -> None:
        """Give a sample its label; the last one counts."""
        self._db.execute(
            "INSERT OR REPLACE INTO late_labels (key, label) SELECT key, ? FROM unlabelled WHERE id = ?",
            (label, name),
        )

    def list(self, *, unlabelled: bool) -> list[Listed]:
        """Every sample that came without a label, or only those that still have none."""
        found = self._db.execute(
            "SELECT id, input, label, held_out, state, COALESCE(refused, '') "
            "FROM unlabelled u LEFT JOIN late_labels l ON l.key = u.key ORDER BY number"
        )
        listed = [
            Listed(name, Row(from_kept(kept), label), bool(held_out), _status(state, label, refused), refused)
            for name, kept, label, held_out, state, refused in found.fetchall()
        ]
        return [one for one in listed if not unlabelled or one.status in ("waiting", "refused")]

    def activations(self, names: Sequence[str], made_by: str) -> dict[str, bytes]:
        """The activations of some samples by id, where they are kept and of use."""
        marks = ", ".join("?" * len(names))
        found = self._db.execute(
            "SELECT id, activations FROM unlabelled u JOIN kept k ON k.key = u.key "
            f"WHERE made_by = ? AND id IN ({marks})",
            (made_by, *names),
        )
        return dict(found.fetchall())

    # --- inside ------------------------------------------------------------------------------------------

    def _put(self, one: UnlabelledSample) -> None:
        sample, size = one.sample, _size(one.sample.row, one.activations)
        if not one.again:
            self._db.execute(
                "INSERT INTO unlabelled (key, id, input, held_out, state, made_by, bytes) "
                "VALUES (?, ?, ?, ?, 'waiting', '', 0)",
                (sample.key, self._free_id(sample.key), to_kept(sample.input), one.held_out),
            )
        known = self._db.execute(
            "UPDATE unlabelled SET made_by = ?, bytes = ? WHERE key = ? AND state = 'waiting'",
            (one.made_by, size, sample.key),
        )
        if known.rowcount:
            self._db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (sample.key, one.activations))

    def _free_id(self, key: bytes) -> str:
        letters = "".join(_LETTERS[byte >> 4] + _LETTERS[byte & 15] for byte in key)
        names = (letters[:length] for length in range(_ID_LETTERS, len(letters) + 1))
        return next(name for name in names if not self._count("id = ?", name))

    def _make_room(self, max_bytes: int) -> int:
        total = self._db.execute("SELECT SUM(bytes) FROM unlabelled").fetchone()[0] or 0
        if total <= max_bytes:
            return 0
        dropped = 0
        oldest = self._db.execute(
            "SELECT key, bytes, state = 'waiting' FROM unlabelled "
            f"WHERE NOT (state = 'waiting' AND {_HAS_LABEL}) ORDER BY state = 'waiting', number"
        )
        for key, size, waits in oldest.fetchall():
            if total <= max_bytes:
                break
            self.drop([key])
            total, dropped = total - size, dropped + waits
        return dropped

    def _count(self, where: str, *values: str) -> int:
        return int(self._db.execute(f"SELECT COUNT(*) FROM unlabelled WHERE {where}", values).fetchone()[0])


_HAS_LABEL: Final = "key IN (SELECT key FROM late_labels WHERE refused = '')"


@contextmanager
def staying(folder: Path, *, alone: bool) -> Iterator[None]:
    """Keep the database's file where it is; ``alone``, to move it, waits until nobody else has it open.

    Raises:
        StateError: the folder cannot be written to.
    """
    try:
        handle = open(folder / "agent.db.lock", "a", opener=private)  # noqa: SIM115
    except OSError as exc:
        raise StateError(f"{folder}: {exc.strerror}") from exc
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def _size(row: Row, activations: bytes) -> int:
    return len(to_kept(row.input).encode()) + len(activations) + _ROW_BYTES


def _status(state: str, label: str | None, refused: str) -> str:
    if state != "waiting" or label is None:
        return state
    return "refused" if refused else "labelled"
