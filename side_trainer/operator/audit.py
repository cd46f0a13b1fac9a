"""A trainer's state directory seen from outside: verify and export. Safe beside a running trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from side_trainer.fold.checkpoint import Checkpoint, newest_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.fold.processors import set_threads
from side_trainer.fold.retention import begin
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import RecordKind, SettingsRecord
from side_trainer.method import Export
from side_trainer.operator.status import open_journal
from sidestream.accelerator.torch_device import HERE, Placement, choose, deterministic
from sidestream.contract.errors import StateError
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import prepared
from sidestream.host.state_dir import write_atomically
from sidestream.side_network.exported import INDEX, Exported

_log = logging.getLogger(__name__)
_TELL_EVERY_S: Final = 2.0
TOLERANCE: Final = 0.001
"""How far weights may lie apart that were folded on another kind of device than they were learnt on."""


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
    begun_at: int = 0
    """The record of the snapshot that the fold began at, as what came before is not kept; 0 for none."""
    unverified: str = ""
    """What of the weights no journal could give again, if there is any such thing."""

    elsewhere: str = ""
    """In words, where it was learnt, if that is another kind of device than it was folded on."""
    distance: float = 0.0
    """How far the two lie apart: of all arrays the largest norm of their difference, by their own."""

    @property
    def exact(self) -> bool:
        """Whether the weights are what the journal gives, to the bit."""
        return self.checkpoint_digest == self.refold_digest

    @property
    def matches(self) -> bool:
        """Whether they are, as far as can be told on this kind of device."""
        return self.exact or (self.elsewhere != "" and self.distance <= TOLERANCE)


def newest_of(state_dir: Path, journal: Journal) -> Checkpoint:
    """The newest checkpoint.

    Raises:
        StateError: there is none, or it is damaged.
    """
    checkpoint = newest_checkpoint(state_dir, journal.run)
    if checkpoint is not None:
        return checkpoint
    raise StateError(
        f"{state_dir} holds no readable checkpoint yet; let the trainer run for a few seconds, or stop it "
        "with Ctrl-C, which writes one"
    )


def verify(state_dir: Path, *, threads: int = 1, tell: Callable[[str], None] = _log.info) -> Verdict:
    """Fold the journal from its first record, or its snapshot, and compare with the newest checkpoint.

    Args:
        state_dir: The trainer's.
        threads: As the trainer's ``threads``, which the last bit may depend on.
        tell: Given a line of progress every two seconds.

    Raises:
        StateError: if there is no journal, no checkpoint, or either is damaged.
    """
    set_threads(threads)
    journal = open_journal(state_dir)
    try:
        checkpoint = newest_of(state_dir, journal)
        about = checkpoint.about
        placement, elsewhere = placement_for(journal, about.offset)
        fold = Fold(journal, placement=placement)
        begun_at = begin(fold, journal)
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
        return judged(fold, journal, checkpoint, begun_at, elsewhere)
    finally:
        journal.close()


def judged(fold: Fold, journal: Journal, checkpoint: Checkpoint, begun_at: int, elsewhere: str) -> Verdict:
    """Hold a fold up to a checkpoint's last record against it.

    Args:
        fold: There.
        journal: Which was folded.
        checkpoint: Its newest.
        begun_at: As a verdict has it.
        elsewhere: Likewise.
    """
    return Verdict(
        offset=fold.offset,
        samples=fold.samples,
        checkpoint_digest=checkpoint.about.weights_digest,
        refold_digest=fold.digest(),
        held_batches=journal.holding.check(),
        begun_at=begun_at,
        unverified=fold.method.unverified if fold.begun else "",
        elsewhere=elsewhere,
        distance=_distance(fold.state(), checkpoint.arrays),
    )


def placement_for(journal: Journal, offset: int) -> tuple[Placement, str]:
    """Where to fold a journal; and where it was learnt, if nothing that is here gives the same bits."""
    return _placement(_kinds(journal, offset))


def _kinds(journal: Journal, offset: int) -> set[str]:
    """On what kinds of devices a journal was learnt from."""
    records = journal.others(offset, (RecordKind.SETTINGS.value,))
    return {msgspec.json.decode(one.payload, type=SettingsRecord).device for one in records}


def _placement(kinds: set[str]) -> tuple[Placement, str]:
    """Where to fold, and, if no one kind of device there is gives the same bits, where it was learnt."""
    placement = choose("auto") if kinds == {"cuda"} else HERE
    deterministic(placement)
    kind = placement.chosen.kind
    return placement, "" if kinds <= {kind} else f"{' and '.join(sorted(kinds))}, here it is {kind}"


def _distance(found: Mapping[str, Floats], kept: Mapping[str, Floats]) -> float:
    """Of what devices get."""
    pairs = [(found[name], kept[name]) for name in found if name.startswith("average/") and name in kept]
    apart = [float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-9)) for a, b in pairs]
    return max(apart, default=0.0)


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
    with contextlib.closing(open_journal(state_dir)) as journal:
        checkpoint = newest_of(state_dir, journal)
        fold = Fold(journal)
        fold.restore(checkpoint.about.offset, checkpoint.about.updates, checkpoint.arrays)
        if not fold.weights():
            raise StateError("nothing to export: the job's labels are not fixed yet")
        form = form or fold.method.formats[0]
        if form not in fold.method.formats:
            raise StateError(f"--format {form}: the job's method writes {', '.join(fold.method.formats)}")
        made = fold.method.export(form, journal.run, journal.version_base + fold.offset, tier)
        made = _with_sampling(made, journal)
    if "" not in made.files:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StateError(f"cannot make {out}: {exc.strerror or exc}; give another --out") from exc
    for name, data in made.files.items():
        _write(out / name if name else out, data)
    return made


def _with_sampling(made: Export, journal: Journal) -> Export:
    """An export that says how the tier's devices sample tokens, by which they measure and predict."""
    if INDEX not in made.files:
        return made
    exported = msgspec.json.decode(made.files[INDEX], type=Exported)
    policies = sorted(journal.policies.get(exported.tier, ()))
    if exported.tier_plan.vocabulary or not policies:
        return made
    privacy = journal.privacy.get(exported.tier, "")
    plan = msgspec.structs.replace(exported.tier_plan, sampling=policies[0], privacy=privacy)
    exported = msgspec.structs.replace(exported, tier_plan=plan)
    index = msgspec.json.format(msgspec.json.encode(exported), indent=2)
    return dataclasses.replace(made, files={**made.files, INDEX: index})


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data, public=True)
    except OSError as exc:
        raise StateError(f"cannot write {path}: {exc.strerror or exc}; give another --out") from exc
