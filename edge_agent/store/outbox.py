"""The device's memory: batches until they are safe, samples already consumed, counters. One SQLite file.

Append, consume and count happen in one transaction, so that after a crash at any moment each sample is either
in a batch or still to be read, never both and never neither. Knows no tensors and no network.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal

from edge_agent.samples.sample import Row, Sample
from edge_agent.store.outbox_file import OutboxFile
from edge_agent.store.streams import BatchState, Slot, Streams, moved
from edge_agent.store.unlabelled import Labelled, UnlabelledSample, UnlabelledStore, staying
from sidestream.backbone.inputs import from_kept, to_kept
from sidestream.contract.errors import StateError
from sidestream.contract.messages import ActivationBatch, awaited_ticket

log = logging.getLogger(__name__)


@dataclass
class Consumed:
    """Samples taken from the source since the last transaction, and what became of them."""

    keys: list[bytes] = field(default_factory=list)
    held_out: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """What to add to the counters."""
    forward_seconds: float = 0.0
    kept: list[UnlabelledSample] = field(default_factory=list)
    """Of them, those that wait for their labels."""
    labelled: list[Labelled] = field(default_factory=list)
    """Samples that have waited for theirs until now."""


class Outbox:
    """The outbox in a state directory, which the caller has locked. Safe between threads.

    Args:
        folder: The state directory.
        job: Once a batch was made, the directory belongs to one job for ever,
        device: to one device; under another name it goes on with a new stream,
        tier: and to one tier.
        max_bytes: Room for waiting batches.
        when_full: ``pause``: :meth:`has_room` says so and the caller waits. ``drop_oldest``: appending drops
            the oldest batches, and counts them.
        unlabelled_max_bytes: Room for samples that wait for their labels.
        keep_share: Share of the room in which receipted batches stay, for the day when the trainer's
            journal is set back to a backup; waiting ones go before them.

    Raises:
        StateError: the directory cannot be used, or belongs to another job or tier.
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
        keep_share: float = 0.5,
    ) -> None:
        self.folder = folder
        self.unlabelled_max_bytes = unlabelled_max_bytes
        self._max_bytes = max_bytes
        self._when_full = when_full
        self._closed = False
        self._file = OutboxFile(folder)
        self.streams = Streams(self._file, int(max_bytes * keep_share))
        """What waits in it, and what is receipted."""
        try:
            self._bind(job=job, device=device, tier=tier)
            self.streams.mend()
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
        """The id of the stream that batches go into, 32 hex digits, made at random."""
        return self.streams.current.name

    def new_birth(self, above: int = 0) -> int:
        """Count one more life of the agent; the first is 1, and it is higher than ``above``."""
        with self._file.transaction():
            birth = max(above, int(self._file.value("births"))) + 1
            self._file.set_value("births", str(birth))
        return birth

    def name(self, key: bytes, part: int = 0) -> bytes:
        """By what the trainer knows a sample, or a part of one, whenever it comes again: 8 bytes.

        A hash under a secret that stays with the outbox, so that nobody can tell from it what a text was. Of
        another device that began with a copy of this outbox an equal row is a sample of its own.
        """
        return hashlib.blake2b(key + part.to_bytes(4, "little"), key=self._secret, digest_size=8).digest()

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

    def consume(self, taken: Consumed) -> None:
        """Remember samples that were not uploaded: held out, or unusable."""
        with self._file.transaction() as db:
            self._consume(db, taken)

    def held_out(self, limit: int) -> list[Row]:
        """The first samples that were held out for evaluation."""
        with self._file.reading() as db:
            found = db.execute("SELECT input, label FROM held_out ORDER BY rowid LIMIT ?", (limit,))
            return [Row(from_kept(kept), label) for kept, label in found.fetchall()]

    @contextmanager
    def unlabelled(self, *, writes: bool = False) -> Iterator[UnlabelledStore]:
        """What waits for labels, to look at, or in a transaction of its own to change."""
        with self._file.transaction() if writes else self._file.reading() as db:
            yield UnlabelledStore(db)

    # --- batches -----------------------------------------------------------------------------------------

    def append_all(
        self,
        batches: Sequence[tuple[Callable[[Slot], bytes], int]],
        taken: Consumed,
        also: Callable[[sqlite3.Connection], None] = lambda db: None,
    ) -> list[int]:
        """Add batches and consume their samples in one transaction: after a crash all is there, or nothing.

        Args:
            batches: What makes each payload, for the place in the stream that it gets, and samples in it.
            taken: Their samples' keys among others, and counts.
            also: What else is written in that transaction.

        Returns:
            The batches' sequence numbers.
        """
        with self._file.transaction() as db:
            sequences: list[int] = []
            for pack, samples in batches:
                sequences.append(self.streams.append(db, pack, samples))
                self._make_room(db)
            self._consume(db, taken)
            also(db)
        return sequences

    def value(self, name: str) -> str:
        """A named value that a method keeps; empty if it was never set."""
        return self._file.value(name)

    def set_value(self, name: str, value: str) -> None:
        """Set it, within a transaction of the outbox's."""
        self._file.set_value(name, value)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """To look at them."""
        with self._file.reading() as db:
            yield db

    def refuse(self, stream: str, sequence: int, digest: str) -> bool:
        """Give up a batch that the trainer will never take, and count it; return whether it was there."""
        with self._file.transaction() as db:
            if stream != self.stream or not self.streams.is_waiting(stream, sequence, digest):
                return False
            self._give_up(db, sequence)
            self._file.add("batches_refused", 1)
        return True

    def _give_up(self, db: sqlite3.Connection, sequence: int) -> int:
        """Let a batch go, and wait for no answer to it; return its samples."""
        query = "SELECT payload FROM batches WHERE stream = ? AND sequence = ?"
        (payload,) = db.execute(query, (self.streams.current.id, sequence)).fetchone()
        if ticket := awaited_ticket(payload):
            db.execute("DELETE FROM flights WHERE ticket = ?", (ticket,))
        return self.streams.give_up(db, sequence)

    def replace(self, sequence: int, parts: Sequence[ActivationBatch]) -> None:
        """Put several batches, which hold the same samples, in the place of one, at the end of the stream."""
        with self._file.transaction() as db:
            if self.streams.give_up(db, sequence):
                for part in parts:
                    self.streams.append(db, partial(moved, part), len(part.sample_ids))

    @property
    def max_bytes(self) -> int:
        """Room for waiting batches."""
        return self._max_bytes

    def size(self) -> tuple[int, int]:
        """Waiting batches, and their bytes."""
        return self.streams.size(BatchState.WAITING)

    def has_room(self) -> bool:
        """Whether another batch may be computed. The cap may be passed by one batch, no more."""
        return self._when_full == "drop_oldest" or self.size()[1] < self._max_bytes

    # --- counters ----------------------------------------------------------------------------------------

    def count(self, name: str, amount: int) -> None:
        """Add to a counter that may lose a little in a crash: it is saved with the next transaction."""
        self._file.count(name, amount)

    def counters(self) -> Counter[str]:
        """Every counter, over the life of the outbox, by field of Telemetry."""
        return self._file.counters()

    def close(self) -> None:
        """Save the counters and close the file. Idempotent."""
        with self._file.lock:
            if self._closed:
                return
            self._closed = True
            try:
                self.consume(Consumed())
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
        self.consume(Consumed())  # saves the counters
        with staying(self.folder, alone=True):
            with self.unlabelled() as store:
                labels = store.labels()
            self._file.exchange(self._kept(known) if known else None, self._kept(run))
        self._bind(**owner)
        with self._file.transaction() as db:
            self._file.set_value("births", births)
            UnlabelledStore(db).take_over(labels)

    def _bind(self, **owner: str) -> None:
        with self._file.transaction() as db:
            if not self._file.value("secret"):
                self._file.set_value("secret", secrets.token_hex(16))
                self._file.set_value("births", self._file.value("births") or "0")
                self.streams.begin(db)
            self._secret = hashlib.sha256(f"{self._file.value('secret')} {owner['device']}".encode()).digest()
            known = {name: self._file.value(name) or value for name, value in owner.items()}
            for name in () if self.streams.empty else ("job", "tier"):  # a first start may have failed
                if known[name] != owner[name]:
                    raise StateError(
                        f"{self.folder}: this state directory belongs to {name} {known[name]!r}, not "
                        f"{owner[name]!r}; give each its own (--state-dir)"
                    )
            for name, value in owner.items():
                self._file.set_value(name, value)
        if known["device"] != owner["device"] and not self.streams.empty:
            log.warning(
                "%s was device %r until now, and is %r from now on",
                self.folder,
                known["device"],
                owner["device"],
            )
            self.streams.fork()

    def _consume(self, db: sqlite3.Connection, taken: Consumed) -> None:
        db.executemany("INSERT OR IGNORE INTO consumed VALUES (?)", [(key,) for key in taken.keys])
        db.executemany(
            "INSERT OR IGNORE INTO held_out (key, input, label) VALUES (?, ?, ?)",
            [(one.key, to_kept(one.input), one.label) for one in taken.held_out],
        )
        for name, amount in taken.counts.items():
            self._file.add(name, amount)
        self._file.add("forward_seconds", taken.forward_seconds)
        store = UnlabelledStore(db)
        store.settle(taken.labelled)
        if dropped := store.put(taken.kept, self.unlabelled_max_bytes):
            self._file.add("unlabelled_dropped", dropped)
            log.warning(
                "%d samples without a label, the oldest, were dropped: unlabelled_max_mib is %d",
                *(dropped, self.unlabelled_max_bytes >> 20),
            )
        self._file.save_counts()

    def _make_room(self, db: sqlite3.Connection) -> None:
        """Receipted batches make room for waiting ones, and the oldest of these for new ones if wanted."""
        total = self.streams.size(BatchState.WAITING)[1]
        self.streams.keep_within(db, self._max_bytes - total)
        while self._when_full == "drop_oldest" and total > self._max_bytes:
            (oldest, *more) = self.streams.waiting(0, 2)
            if not more:
                return
            self._file.add("batches_dropped", 1)
            self._file.add("samples_dropped", self._give_up(db, oldest.sequence))
            total -= len(oldest.payload)
