"""The device's memory: batches until they are receipted, samples already consumed, counters. One SQLite file.

Append, consume and count happen in one transaction, so that after a crash at any moment each sample is either
in a batch or still to be read, never both and never neither. Knows no tensors and no network.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

from contract.errors import MismatchError, StateError
from edge_agent.outbox_file import OutboxFile
from edge_agent.samples import Row, Sample
from edge_agent.shelf import Kept, Labelled, Shelf, staying

log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """A batch's place in the stream; its payload carries all of it."""

    stream: str
    sequence: int
    floor: int
    first_sample: int
    """Ordinal number of its first sample; the others follow."""


class Waiting(NamedTuple):
    """A batch in the outbox."""

    sequence: int
    payload: bytes


@dataclass
class Taken:
    """Samples taken from the source since the last transaction, and what became of them."""

    keys: list[bytes] = field(default_factory=list)
    held_out: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """What to add to the counters; names as in :class:`contract.messages.Telemetry`."""
    forward_seconds: float = 0.0
    kept: list[Kept] = field(default_factory=list)
    """Of them, those that wait for their labels."""
    labelled: list[Labelled] = field(default_factory=list)
    """Samples that have waited for theirs until now."""


class Outbox:
    """The outbox in a state directory, which the caller has locked. Safe between threads.

    Args:
        folder: The state directory.
        job: The directory belongs to one job for ever,
        device: to one device,
        tier: and to one tier.
        max_bytes: Room for waiting batches.
        when_full: ``pause``: :meth:`has_room` says so and the caller waits. ``drop_oldest``: appending drops
            the oldest batches, and counts them.
        unlabelled_max_bytes: Room for samples that wait for their labels.

    Raises:
        StateError: the directory cannot be used, or belongs to another job, device or tier.
    """

    def __init__(
        self,
        folder: Path,
        *,
        job: str,
        device: str,
        tier: str,
        max_bytes: int,
        when_full: Literal["pause", "drop_oldest"] = "pause",
        unlabelled_max_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self.folder = folder
        self.unlabelled_max_bytes = unlabelled_max_bytes
        self._max_bytes = max_bytes
        self._when_full = when_full
        self._closed = False
        self._file = OutboxFile(folder)
        try:
            self._bind(job=job, device=device, tier=tier)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Outbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- identity ----------------------------------------------------------------------------------------

    @property
    def stream(self) -> str:
        """The stream's id, 32 hex digits, made at random with the outbox."""
        return self._file.value("stream")

    @property
    def next_sequence(self) -> int:
        """The number that the next batch will get."""
        return int(self._file.value("next_sequence"))

    def new_birth(self) -> int:
        """Count one more life of the agent; the first is 1."""
        with self._file.transaction():
            birth = int(self._file.value("births")) + 1
            self._file.set_value("births", str(birth))
        return birth

    def begin_run(self, run: str) -> bool:
        """Bind the outbox to a trainer's journal.

        A journal that is new knows nothing of what was sent before: the stream starts over with a new id, and
        every sample may be read again. What the journal before had been sent is kept beside it, for the day
        when that trainer comes back: its samples must not count twice.

        Returns:
            Whether the stream is another one than before.
        """
        with self._file.lock:
            known = self._file.value("run")
            if known == run:
                return False
            changes = bool(known) or self._kept(run).exists()
            if changes:
                self._change_runs(known, run)
            with self._file.transaction():
                self._file.set_value("run", run)
            return changes

    # --- samples -----------------------------------------------------------------------------------------

    def is_consumed(self, key: bytes) -> bool:
        """Whether a sample needs no more looking at."""
        with self._file.reading() as db:
            return db.execute("SELECT 1 FROM consumed WHERE key = ?", (key,)).fetchone() is not None

    def consume(self, taken: Taken) -> None:
        """Remember samples that were not uploaded: held out, or unusable."""
        with self._file.transaction() as db:
            self._consume(db, taken)

    def held_out(self, limit: int) -> list[Row]:
        """The first samples that were held out for evaluation."""
        with self._file.reading() as db:
            found = db.execute("SELECT text, label, pair FROM held_out ORDER BY rowid LIMIT ?", (limit,))
            return [Row(*row) for row in found.fetchall()]

    @contextmanager
    def shelf(self, *, writes: bool = False) -> Iterator[Shelf]:
        """What waits for labels, to look at, or in a transaction of its own to change."""
        with self._file.transaction() if writes else self._file.reading() as db:
            yield Shelf(db)

    # --- batches -----------------------------------------------------------------------------------------

    def append(self, pack: Callable[[Slot], bytes], samples: int, taken: Taken) -> int:
        """As :meth:`append_all`, of one batch; return its sequence number."""
        return self.append_all([(pack, samples)], taken)[0]

    def append_all(self, batches: Sequence[tuple[Callable[[Slot], bytes], int]], taken: Taken) -> list[int]:
        """Add batches and consume their samples in one transaction: after a crash all is there, or nothing.

        Args:
            batches: What makes each payload, for the place in the stream that it gets, and samples in it.
            taken: Their samples' keys among others, and counts.

        Returns:
            The batches' sequence numbers.
        """
        with self._file.transaction() as db:
            sequences: list[int] = []
            for pack, samples in batches:
                sequence = self.next_sequence
                first = int(self._file.value("next_sample"))
                payload = pack(Slot(self.stream, sequence, self.floor, first))
                if self._when_full == "drop_oldest":
                    self._make_room(db, len(payload))
                db.execute("INSERT INTO batches VALUES (?, ?, ?)", (sequence, samples, payload))
                self._file.set_value("next_sequence", str(sequence + 1))
                self._file.set_value("next_sample", str(first + samples))
                sequences.append(sequence)
            self._consume(db, taken)
        return sequences

    def pending(self, after: int, limit: int) -> list[Waiting]:
        """Up to ``limit`` waiting batches with sequences over ``after``, in order."""
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT sequence, payload FROM batches WHERE sequence > ? ORDER BY sequence LIMIT ?",
                (after, limit),
            ).fetchall()
        return [Waiting(sequence, payload) for sequence, payload in rows]

    def receipt(self, upto: int) -> list[int]:
        """Delete every batch up to a sequence, because the trainer has it.

        Returns:
            The sequences that were deleted.

        Raises:
            MismatchError: the receipt is for batches that this outbox never made. Nothing is deleted: either
                it is forged, or the outbox was set back and what it holds would pass for repeats.
        """
        with self._file.lock:
            if upto >= self.next_sequence:
                raise MismatchError(
                    f"it is for batches up to {upto}, but this outbox only got to {self.next_sequence - 1}. "
                    f"If {self.folder} was restored from an older copy, give the agent a new --state-dir and "
                    "data that it has not sent yet; nothing is deleted meanwhile"
                )
            if upto < self.floor:
                return []
            with self._file.transaction() as db:
                gone = db.execute(
                    "SELECT sequence FROM batches WHERE sequence <= ? ORDER BY sequence", (upto,)
                )
                sequences = [sequence for (sequence,) in gone.fetchall()]
                db.execute("DELETE FROM batches WHERE sequence <= ?", (upto,))
            return sequences

    def refuse(self, sequence: int) -> None:
        """Delete one batch, because the trainer will never take it, and count it."""
        with self._file.transaction() as db:
            if db.execute("DELETE FROM batches WHERE sequence = ?", (sequence,)).rowcount:
                self._file.add("batches_refused", 1)

    def replace(self, sequence: int, parts: Sequence[tuple[Callable[[Slot], bytes], int]]) -> None:
        """Put several batches, which hold the same samples, in the place of one, at the end of the stream.

        Args:
            sequence: Of the one.
            parts: As in :meth:`append_all`; they number their samples as the one did.
        """
        with self._file.transaction() as db:
            if not db.execute("DELETE FROM batches WHERE sequence = ?", (sequence,)).rowcount:
                return
            for pack, samples in parts:
                number = self.next_sequence
                payload = pack(Slot(self.stream, number, self.floor, 0))
                db.execute("INSERT INTO batches VALUES (?, ?, ?)", (number, samples, payload))
                self._file.set_value("next_sequence", str(number + 1))

    @property
    def max_bytes(self) -> int:
        """Room for waiting batches."""
        return self._max_bytes

    @property
    def floor(self) -> int:
        """The lowest sequence still waiting; if none is, the next one to be made."""
        with self._file.reading() as db:
            lowest = db.execute("SELECT MIN(sequence) FROM batches").fetchone()[0]
            # Within: a batch that comes between the two would lie below the floor.
            return self.next_sequence if lowest is None else int(lowest)

    def size(self) -> tuple[int, int]:
        """Waiting batches, and their bytes."""
        with self._file.reading() as db:
            count, total = db.execute("SELECT COUNT(*), SUM(LENGTH(payload)) FROM batches").fetchone()
        return count, total or 0

    def has_room(self) -> bool:
        """Whether another batch may be computed. The cap may be passed by one batch, no more."""
        return self._when_full == "drop_oldest" or self.size()[1] < self._max_bytes

    # --- counters ----------------------------------------------------------------------------------------

    def count(self, name: str, amount: int) -> None:
        """Add to a counter that may lose a little in a crash: it is saved with the next transaction."""
        self._file.count(name, amount)

    def counters(self) -> Counter[str]:
        """Every counter, over the life of the outbox; ``forward_us`` in microseconds."""
        return self._file.counters()

    def close(self) -> None:
        """Save the counters and close the file. Idempotent."""
        with self._file.lock:
            if self._closed:
                return
            self._closed = True
            try:
                self.consume(Taken())
            except StateError as exc:
                log.warning("counters were not saved: %s", exc)
            self._file.close()

    # --- inside ------------------------------------------------------------------------------------------

    def _kept(self, run: str) -> Path:
        """Where the outbox of a run waits while another run is on."""
        return self.folder / f"agent-{run}.db"

    def _change_runs(self, known: str, run: str) -> None:
        """Put this outbox away and take out the one of ``run``, or a new one."""
        owner = {name: self._file.value(name) for name in ("job", "device", "tier")}
        births = self._file.value("births")
        self.consume(Taken())  # saves the counters
        with staying(self.folder, alone=True):
            with self.shelf() as shelf:
                labels = shelf.labels()
            self._file.exchange(self._kept(known) if known else None, self._kept(run))
        self._bind(**owner)
        with self._file.transaction() as db:
            self._file.set_value("births", births)
            Shelf(db).take_over(labels)

    def _bind(self, **owner: str) -> None:
        with self._file.transaction():
            if not self._file.value("stream"):
                self._make_stream()
            for name, value in owner.items():
                known = self._file.value(name) or value
                if known != value:
                    raise StateError(
                        f"{self.folder}: this state directory belongs to {name} {known!r}, not {value!r}; "
                        "give each its own (--state-dir)"
                    )
                self._file.set_value(name, value)

    def _make_stream(self) -> None:
        self._file.set_value("stream", secrets.token_hex(16))
        self._file.set_value("next_sequence", "1")
        self._file.set_value("next_sample", "0")
        self._file.set_value("births", self._file.value("births") or "0")

    def _consume(self, db: sqlite3.Connection, taken: Taken) -> None:
        db.executemany("INSERT OR IGNORE INTO consumed VALUES (?)", [(key,) for key in taken.keys])
        db.executemany(
            "INSERT OR IGNORE INTO held_out (key, text, label, pair) VALUES (?, ?, ?, ?)",
            [(sample.key, *sample.row) for sample in taken.held_out],
        )
        for name, amount in taken.counts.items():
            self._file.add(name, amount)
        self._file.add("forward_us", round(taken.forward_seconds * 1e6))
        shelf = Shelf(db)
        shelf.settle(taken.labelled)
        if dropped := shelf.put(taken.kept, self.unlabelled_max_bytes):
            self._file.add("unlabelled_dropped", dropped)
            log.warning(
                "%d samples without a label, the oldest, were dropped: unlabelled_max_mib is %d",
                *(dropped, self.unlabelled_max_bytes >> 20),
            )
        self._file.save_counts()

    def _make_room(self, db: sqlite3.Connection, needed: int) -> None:
        count, total = self.size()
        while count and total + needed > self._max_bytes:
            row = db.execute(
                "SELECT sequence, samples, LENGTH(payload) FROM batches ORDER BY sequence LIMIT 1"
            ).fetchone()
            db.execute("DELETE FROM batches WHERE sequence = ?", (row[0],))
            self._file.add("batches_dropped", 1)
            self._file.add("samples_dropped", row[1])
            count, total = count - 1, total - row[2]
