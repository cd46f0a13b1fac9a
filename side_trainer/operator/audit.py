"""A trainer's state directory seen from outside: verify, export, status. Safe beside a running trainer."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import torch

from side_trainer.fold.checkpoint import Checkpoint, checkpoints, newest_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.fold.training_rows import count_samples
from side_trainer.journal.journal import FILE_NAME, Journal, StreamState
from side_trainer.journal.records import TierRecord
from side_trainer.quarantine.quarantine import Judgement, Quarantine, State, judgements
from sidestream.contract.errors import StateError
from sidestream.contract.plan import TierPlan
from sidestream.contract.tasks import TASKS
from sidestream.contract.wire import prepared
from sidestream.host.state_dir import write_atomically
from sidestream.side_network.bundle import About, digest, encode_bundle
from sidestream.side_network.exported import INDEX, WEIGHTS, Exported
from sidestream.side_network.form import align_of, first_blocks

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

    @property
    def matches(self) -> bool:
        """Whether the weights are what the journal gives."""
        return self.checkpoint_digest == self.refold_digest


@prepared
class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """What the journal holds of a device."""

    device: str
    """Its id."""
    stream: str
    """Its outbox's id."""
    batches: int
    """Journaled."""
    samples: int
    """In them."""
    bytes: int
    """Of their payloads."""
    watermark: int
    """Receipted up to here."""
    lost: int = 0
    """Samples receipted before the journal was set back, which neither it nor the device has any more."""


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
    devices: list[DeviceState]
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
            samples=len(fold.rows),
            checkpoint_digest=about.weights_digest,
            refold_digest=fold.digest(),
            held_batches=journal.holding.check(),
        )
    finally:
        journal.close()


def export(state_dir: Path, out: Path) -> About:
    """Write the newest checkpoint's weights with every alignment map and their spec: one safetensors file.

    Raises:
        StateError: if there is nothing to export, or the file cannot be written.
    """
    with _restored(state_dir) as (journal, fold):
        about = _about(fold, journal, list(fold.tiers.values()))
        _write(out, encode_bundle(about, fold.weights()))
    return about


def export_tuned(state_dir: Path, out: Path, tier: str = "") -> Exported:
    """Write a folder that :func:`edge_agent.load_tuned` makes a transformers model of.

    Args:
        state_dir: The trainer's.
        out: The folder.
        tier: Whose backbone; default: the deepest one's.

    Raises:
        StateError: if there is nothing to export, the job is no language model's, or nothing can be written.
    """
    with _restored(state_dir) as (journal, fold):
        if fold.settings is None or not TASKS[fold.settings.task].generates:
            raise StateError("--format hf is for language models; leave it out")
        if tier not in fold.tiers and (tier or not fold.tiers):
            settled = ", ".join(sorted(fold.tiers)) or "none"
            raise StateError(f"--tier: {tier!r} is no settled tier of the job; there are: {settled}")
        record = fold.tiers[tier] if tier else max(fold.tiers.values(), key=lambda one: (one.depth, one.tier))
        about = _about(fold, journal, [record], blocks=len(record.taps))
        tensors = {
            name: array for name, array in fold.weights().items() if align_of(name) in (None, record.align)
        }
        data = encode_bundle(about, first_blocks(tensors, len(record.taps)))
        exported = Exported(tier=record.tier, tier_plan=_plan_of(record), weights_digest=digest(data))
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StateError(f"cannot make {out}: {exc.strerror or exc}; give another --out") from exc
        _write(out / WEIGHTS, data)
        _write(out / INDEX, msgspec.json.format(msgspec.json.encode(exported), indent=2))
    return exported


def _plan_of(record: TierRecord) -> TierPlan:
    return TierPlan(
        backbone=record.backbone,
        layers=record.depth,
        align=record.align,
        sampling="all",
        depth=record.depth,
        width=record.width,
        taps=record.taps,
        fingerprint=record.fingerprint,
        head=record.head,
        vocabulary=record.vocabulary,
    )


@contextmanager
def _restored(state_dir: Path) -> Iterator[tuple[Journal, Fold]]:
    """The journal, and the fold as the newest checkpoint has it."""
    journal = _open(state_dir)
    try:
        checkpoint = _newest(state_dir, journal)
        fold = Fold(journal)
        fold.restore(checkpoint.about.offset, checkpoint.about.updates, checkpoint.arrays)
        if fold.settings is None or fold.network is None:
            raise StateError("nothing to export: the job's labels are not fixed yet")
        yield journal, fold
    finally:
        journal.close()


def _about(fold: Fold, journal: Journal, tiers: list[TierRecord], blocks: int = 0) -> About:
    assert fold.settings is not None
    spec = fold.settings.side_network
    return About(
        job=fold.settings.job,
        run=journal.run,
        version=journal.version_base + fold.offset,
        labels=fold.labels,
        task=fold.settings.task,
        scale=fold.scale,
        side_network=msgspec.structs.replace(spec, blocks=blocks or spec.blocks),
        aligns={tier.align: tier.width for tier in tiers},
        tiers={tier.tier: tier.align for tier in tiers},
    )


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
            job=fold.settings.job if fold.settings else "",
            run=journal.run,
            records=journal.tail,
            batches=counts.batches,
            samples=counts.samples,
            samples_unique=counts.unique,
            samples_trained_unique=counts.trained,
            checkpoint_offset=offset,
            weights_digest=newest.about.weights_digest if newest else "",
            published_version=max(journal.published, default=0),
            labels=fold.labels,
            tiers={name: tier.depth for name, tier in fold.tiers.items()},
            devices=[_device(stream, journal.lost) for stream in journal.streams()],
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


def _device(stream: StreamState, lost: Mapping[str, int]) -> DeviceState:
    return DeviceState(
        device=stream.device,
        stream=stream.stream,
        batches=stream.batches,
        samples=stream.samples,
        bytes=stream.bytes,
        watermark=stream.watermark,
        lost=lost.get(stream.stream, 0),
    )
