"""A trainer's state directory seen from outside: verify, export, status. Safe beside a running trainer."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import torch

from side_trainer.fold.checkpoint import Checkpoint, checkpoints, newest_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.journal.journal import FILE_NAME, Journal, StreamState
from side_trainer.method import Export
from side_trainer.quarantine.quarantine import Judgement, Quarantine, State, judgements
from side_trainer.side_tuning.training_rows import count_samples
from sidestream.contract.errors import StateError
from sidestream.contract.wire import prepared
from sidestream.host.state_dir import write_atomically

_log = logging.getLogger(__name__)
_TELL_EVERY_S: Final = 2.0


@prepared
class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a re-fold."""

    offset: int
    """Records folded: those that the checkpoint includes."""
    samples: int
    """Distinct samples among them."""
    checkpoint_digest: str
    """What the checkpoint says."""
    refold_digest: str
    """What the journal gives."""
    held_batches: int = 0
    """Read through as well: those that are kept of quarantined devices and not learnt from."""
    unverified: str = ""
    """What of the weights no journal could give again, if there is any such thing."""

    @property
    def matches(self) -> bool:
        """Whether the weights are what the journal gives."""
        return self.checkpoint_digest == self.refold_digest


@prepared
class TrainerState(msgspec.Struct, frozen=True, kw_only=True):
    """What a state directory holds."""

    job: str
    """The job's name."""
    run: str
    """The journal's id."""
    records: int
    """In the journal."""
    batches: int
    """Of those, batches."""
    samples: int
    """In those batches."""
    samples_unique: int
    """Distinct among them."""
    samples_trained_unique: int
    """Distinct among those that the newest checkpoint includes."""
    checkpoint_offset: int
    """Records that the newest checkpoint includes."""
    weights_digest: str
    """Of the weights in it."""
    published_version: int
    """The highest version ever published."""
    labels: tuple[str, ...]
    """Label names, in index order."""
    tiers: dict[str, int]
    """Depth of each settled tier."""
    devices: list[StreamState]
    """By device."""


def _open(state_dir: Path) -> Journal:
    if not state_dir.is_dir():
        raise StateError(f"no state directory at {state_dir}; give the trainer's with --state-dir")
    return Journal(state_dir / FILE_NAME, read_only=True)


def _newest(state_dir: Path, journal: Journal) -> Checkpoint:
    checkpoint = newest_checkpoint(state_dir, journal.run)
    if checkpoint is not None:
        return checkpoint
    raise StateError(
        f"{state_dir} holds no readable checkpoint yet; let the trainer run for a few seconds, or stop it "
        "with Ctrl-C, which writes one"
    )


def verify(state_dir: Path, *, threads: int = 1, tell: Callable[[str], None] = _log.info) -> Verdict:
    """Fold the journal from its first record and compare with the newest checkpoint.

    Args:
        state_dir: The trainer's.
        threads: As the trainer's ``threads``, which the last bit may depend on.
        tell: Given a line of progress every two seconds.

    Raises:
        StateError: if there is no journal, no checkpoint, or either is damaged.
    """
    torch.set_num_threads(threads)
    journal = _open(state_dir)
    try:
        about = _newest(state_dir, journal).about
        fold = Fold(journal)
        told = time.monotonic()
        while fold.offset < about.offset:
            records = journal.read(fold.offset, limit=min(16, about.offset - fold.offset))
            if not records:
                break
            for record in records:
                fold.apply(record)
            if time.monotonic() - told > _TELL_EVERY_S:
                told = time.monotonic()
                tell(f"folded {fold.offset} of {about.offset} records")
        return Verdict(
            offset=fold.offset,
            samples=fold.samples,
            checkpoint_digest=about.weights_digest,
            refold_digest=fold.digest(),
            held_batches=journal.holding.check(),
            unverified=fold.method.unverified if fold.begun else "",
        )
    finally:
        journal.close()


def export(state_dir: Path, out: Path, form: str = "", tier: str = "") -> Export:
    """Write the newest checkpoint's weights as files.

    Args:
        state_dir: The trainer's.
        out: The file, or the folder, to write.
        form: One of the formats that the job's method has; empty for its first.
        tier: Whose weights, where the format is of one tier; empty for the method's own choice.

    Raises:
        StateError: if there is nothing to export, not in that form, or nothing can be written.
    """
    with contextlib.closing(_open(state_dir)) as journal:
        checkpoint = _newest(state_dir, journal)
        fold = Fold(journal)
        fold.restore(checkpoint.about.offset, checkpoint.about.updates, checkpoint.arrays)
        if not fold.weights():
            raise StateError("nothing to export: the job's labels are not fixed yet")
        form = form or fold.method.formats[0]
        if form not in fold.method.formats:
            raise StateError(f"--format {form}: the job's method writes {', '.join(fold.method.formats)}")
        made = fold.method.export(form, journal.run, journal.version_base + fold.offset, tier)
    if "" not in made.files:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StateError(f"cannot make {out}: {exc.strerror or exc}; give another --out") from exc
    for name, data in made.files.items():
        _write(out / name if name else out, data)
    return made


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data, public=True)
    except OSError as exc:
        raise StateError(f"cannot write {path}: {exc.strerror or exc}; give another --out") from exc


def read_state(state_dir: Path) -> TrainerState:
    """Sum up a state directory.

    Raises:
        StateError: if there is no journal.
    """
    journal = _open(state_dir)
    try:
        newest = next(iter(checkpoints(state_dir, journal.run)), None)
        offset = newest.about.offset if newest else 0
        fold = Fold(journal)
        fold.recall_facts(journal.tail)
        # Of one moment, all of them: a trainer may be appending meanwhile.
        counts = count_samples(journal, journal.tail, trained=offset)
        return TrainerState(
            job=fold.facts.settings.job if fold.begun else "",
            run=journal.run,
            records=journal.tail,
            batches=counts.batches,
            samples=counts.samples,
            samples_unique=counts.unique,
            samples_trained_unique=counts.trained,
            checkpoint_offset=offset,
            weights_digest=newest.about.weights_digest if newest else "",
            published_version=journal.highest,
            labels=fold.facts.labels if fold.begun else (),
            tiers={name: tier.depth for name, tier in fold.facts.tiers.items()} if fold.begun else {},
            devices=journal.streams(),
        )
    finally:
        journal.close()


def quarantined(state_dir: Path) -> list[Judgement]:
    """Devices about which something was decided.

    Raises:
        StateError: if there is no journal.
    """
    with contextlib.closing(_open(state_dir)) as journal:
        return judgements(journal)


def decide(state_dir: Path, device: str, state: State) -> None:
    """Note the operator's decision about a device; a running trainer follows it.

    Raises:
        ConfigError: if the journal knows no such device.
        StateError: if there is no journal.
    """
    _open(state_dir).close()
    with contextlib.closing(Journal(state_dir / FILE_NAME)) as journal:
        Quarantine(journal).order(device, state, "by the operator")
