"""What a trainer's state directory holds, and the operator's word about devices. Starts fast: knows no torch.

Safe beside a running trainer.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import msgspec

from side_trainer.fold.checkpoint import checkpoints
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import LabelsRecord, RecordKind, SettingsRecord, StreamState, TierRecord
from side_trainer.quarantine.quarantine import Judgement, Quarantine, State, judgements
from sidestream.contract.errors import StateError
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.wire import prepared, unpack


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


class SampleCounts(NamedTuple):
    """What the batches up to an offset hold."""

    batches: int
    """How many they are."""
    samples: int
    """Samples in them."""
    unique: int
    """Distinct ones, by stream and ordinal number."""
    trained: int
    """Distinct ones in those batches that a checkpoint includes."""


def _count_samples(journal: Journal, upto: int, *, trained: int) -> SampleCounts:
    """Count in one reading of the batches up to ``upto``; a checkpoint includes those up to ``trained``."""
    batches = [one for one in journal.batches(upto) if one[1]]  # others are of a later pass of a split job
    all_seen: set[tuple[str, int]] = set()
    trained_seen = 0
    for offset, *_ in batches:
        batch = unpack(ActivationBatch, journal.get(offset).payload)
        all_seen.update((batch.stream, sample) for sample in batch.sample_ids.tolist())
        if offset <= trained:
            trained_seen = len(all_seen)
    samples = sum(count for _, count in batches)
    return SampleCounts(len(batches), samples, len(all_seen), trained_seen)


class _Facts(NamedTuple):
    job: str
    labels: tuple[str, ...]
    tiers: dict[str, int]


def _facts(journal: Journal) -> _Facts:
    job, tiers = "", dict[str, int]()
    labels: tuple[str, ...] = ()
    kinds = (RecordKind.SETTINGS.value, RecordKind.LABELS.value, RecordKind.TIER.value)
    for record in journal.others(journal.tail, kinds):
        if record.kind == RecordKind.SETTINGS.value:
            job = msgspec.json.decode(record.payload, type=SettingsRecord).job
        elif record.kind == RecordKind.LABELS.value:
            labels = msgspec.json.decode(record.payload, type=LabelsRecord).labels
        else:
            tier = msgspec.json.decode(record.payload, type=TierRecord)
            tiers[tier.tier] = tier.depth
    return _Facts(job, labels, tiers)


def open_journal(state_dir: Path) -> Journal:
    """Read-only.

    Raises:
        StateError: if there is none.
    """
    if not state_dir.is_dir():
        raise StateError(f"no state directory at {state_dir}; give the trainer's with --state-dir")
    return Journal(state_dir / FILE_NAME, read_only=True)


def read_state(state_dir: Path) -> TrainerState:
    """Sum up a state directory.

    Raises:
        StateError: if there is no journal.
    """
    journal = open_journal(state_dir)
    try:
        newest = next(iter(checkpoints(state_dir, journal.run)), None)
        offset = newest.about.offset if newest else 0
        facts = _facts(journal)
        # Of one moment, all of them: a trainer may be appending meanwhile.
        counts = _count_samples(journal, journal.tail, trained=offset)
        return TrainerState(
            job=facts.job,
            run=journal.run,
            records=journal.tail,
            batches=counts.batches,
            samples=counts.samples,
            samples_unique=counts.unique,
            samples_trained_unique=counts.trained,
            checkpoint_offset=offset,
            weights_digest=newest.about.weights_digest if newest else "",
            published_version=journal.highest,
            labels=facts.labels,
            tiers=facts.tiers,
            devices=journal.streams(),
        )
    finally:
        journal.close()


def quarantined(state_dir: Path) -> list[Judgement]:
    """Devices about which something was decided.

    Raises:
        StateError: if there is no journal.
    """
    with contextlib.closing(open_journal(state_dir)) as journal:
        return judgements(journal)


def decide(state_dir: Path, device: str, state: State) -> None:
    """Note the operator's decision about a device; a running trainer follows it.

    Raises:
        ConfigError: if the journal knows no such device.
        StateError: if there is no journal.
    """
    open_journal(state_dir).close()
    with contextlib.closing(Journal(state_dir / FILE_NAME)) as journal:
        Quarantine(journal).order(device, state, "by the operator")
