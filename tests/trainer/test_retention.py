"""Batches that are learnt from can be let go: weights go on to the same bits, and nothing counts twice."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from broker_config.testing.inprocess import InProcessBroker
from metrics.catalogue import TrainerMetrics
from side_trainer.fold.checkpoint import write_checkpoint
from side_trainer.fold.checkpointer import Checkpointer
from side_trainer.fold.fold import Fold
from side_trainer.fold.retention import Retention, begin
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Claim, Journal
from side_trainer.journal.records import RecordKind
from side_trainer.operator.audit import verify
from side_trainer.operator.rebuild import rebuild
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import ConfigError, StateError
from sidestream.contract.messages import ActivationBatch, WeightsManifest
from sidestream.contract.wire import unpack
from tests.trainer.conftest import FakeDevice, append, config, devices, fold_all, put, settle
from tests.trainer.test_trainer import TOPICS, Listener, born, final, receipted, send, trainer
from tests.until import until

DAY = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


class Kept:
    """A job with bounds, and what its learner does with them."""

    def __init__(self, journal: Journal, folder: Path, **bounds: float) -> None:
        self.config = config(folder, **bounds)
        self.journal, self.folder, self.clock = journal, folder, Clock()
        self.job, self.fleet = Job(self.config, journal), devices()
        settle(self.job, self.fleet)
        self.sent: list[tuple[FakeDevice, ActivationBatch]] = []
        self.fold = fold_all(journal, Fold(journal))
        self.retention = Retention(self.config, journal, self.fold, self.clock)

    def send(self, batches: int) -> None:
        for index in range(batches):
            device = self.fleet[index % len(self.fleet)]
            batch = device.batch(self.job.plan)
            assert append(self.journal, device, batch)
            self.sent.append((device, batch))
        fold_all(self.journal, self.fold)

    def idle(self, fold: Fold | None = None) -> Fold:
        fold = fold or self.fold
        while fold.method.owed(self.config.learner.passes) > 0:
            slice_ = fold.method.next_idle(self.config.learner.passes, 8, fold.offset)
            self.journal.append("idle", msgspec.json.encode(slice_))
            fold_all(self.journal, fold)
        return fold

    def mark(self) -> bool:
        """Journal a snapshot if one is due."""
        self.clock.now += 61
        snapshot = self.retention.due()
        if snapshot is not None:
            self.journal.append(RecordKind.SNAPSHOT.value, msgspec.json.encode(snapshot))
            fold_all(self.journal, self.fold)
        return snapshot is not None

    def cut(self) -> None:
        write_checkpoint(self.folder, self.fold, self.journal.run)
        while self.retention.let_go(self.folder):
            pass

    @property
    def here(self) -> int:
        return sum(rows for _, rows in self.journal.batches(self.journal.tail))


def copied(journal: Journal, folder: Path) -> Journal:
    """The journal as another machine would have it, without checkpoints."""
    folder.mkdir()
    with closing(Journal(folder / FILE_NAME)) as other:
        journal.db.backup(other.db)
    return Journal(folder / FILE_NAME)


def test_a_fold_from_the_snapshot_goes_on_to_the_bits_of_one_that_saw_everything(
    journal: Journal, tmp_path: Path
) -> None:
    kept = Kept(journal, tmp_path, keep_samples=100)
    kept.send(20)
    kept.idle()
    assert kept.mark() and kept.here == 160
    with closing(copied(journal, tmp_path / "all")) as everything:
        whole = fold_all(everything, Fold(everything))
        kept.cut()
        assert kept.here == 80 and sum(rows for _, rows in everything.batches(everything.tail)) == 160
        kept.send(6)
        for device, batch in kept.sent[20:]:
            assert append(everything, device, batch)
        fold_all(everything, whole)
        kept.idle()
        while whole.method.owed(2) > 0:
            everything.append("idle", msgspec.json.encode(whole.method.next_idle(2, 8, whole.offset)))
            fold_all(everything, whole)
        late = Fold(journal)
        assert begin(late, journal) and late.samples == 160
        assert fold_all(journal, late).digest() == kept.fold.digest() == whole.digest()
        assert late.method.owed(2) == kept.fold.method.owed(2) == 0 and late.samples == 208


def test_what_is_let_go_is_known_again(journal: Journal, tmp_path: Path) -> None:
    kept = Kept(journal, tmp_path, keep_samples=60)
    kept.send(12)
    assert kept.mark()
    kept.cut()
    before = journal.tail
    for device, batch in kept.sent:
        with journal.transaction():
            assert put(journal, device, batch).claim is Claim.KNOWN
    assert journal.tail == before and journal.samples() == 96


def test_killed_between_any_two_steps_it_goes_on_to_the_same_bits(journal: Journal, tmp_path: Path) -> None:
    kept = Kept(journal, tmp_path, keep_samples=60)
    kept.send(12)
    kept.idle()
    assert kept.mark()
    wanted = kept.fold.digest()

    def again() -> None:
        fold = Fold(journal)
        begin(fold, journal)
        assert fold_all(journal, fold).digest() == wanted and fold.samples == 96

    again()  # nothing is deleted yet
    assert not Retention(kept.config, journal, Fold(journal)).let_go(tmp_path), "no checkpoint stands for it"
    write_checkpoint(tmp_path, kept.fold, journal.run)
    journal.keeping.keep(next(tmp_path.glob("checkpoint-*")).read_bytes())
    again()  # the snapshot is there, and all batches
    journal.db.execute(
        "DELETE FROM records WHERE offset IN (SELECT min(offset) FROM records WHERE kind='batch')"
    )
    again()  # some are gone
    kept.cut()
    again()


def test_a_checkpoint_from_before_the_snapshot_is_passed_over(journal: Journal, tmp_path: Path) -> None:
    kept = Kept(journal, tmp_path, keep_samples=60)
    kept.send(8)
    write_checkpoint(tmp_path, kept.fold, journal.run)
    old = next(tmp_path.glob("checkpoint-*"))
    kept_old = old.read_bytes()
    kept.send(8)
    assert kept.mark()
    kept.cut()
    for path in tmp_path.glob("checkpoint-*"):
        path.unlink()
    old.write_bytes(kept_old)
    fold = Fold(journal)
    Checkpointer(tmp_path, fold, journal, TrainerMetrics(CollectorRegistry()))
    assert fold_all(journal, fold).digest() == kept.fold.digest()


def test_a_checkpoint_after_the_snapshot_counts_no_row_twice(journal: Journal, tmp_path: Path) -> None:
    kept = Kept(journal, tmp_path, keep_samples=100)
    kept.send(20)
    kept.idle()
    assert kept.mark()
    kept.cut()
    kept.send(6)
    write_checkpoint(tmp_path, kept.fold, journal.run)
    again = Fold(journal)
    Checkpointer(tmp_path, again, journal, TrainerMetrics(CollectorRegistry()))
    assert (again.offset, again.samples) == (kept.fold.offset, kept.fold.samples)
    kept.send(3)
    kept.idle()
    assert fold_all(journal, again).digest() == kept.fold.digest()


def test_days_go_by_the_clock_and_a_bound_is_not_cut_to_at_every_look(
    journal: Journal, tmp_path: Path
) -> None:
    kept = Kept(journal, tmp_path, keep_days=10.0)
    kept.send(3)
    for _ in range(14):
        assert not kept.mark()
        kept.clock.now += DAY - 61
        kept.send(3)
        if kept.here > 13 * 24:
            break
    found = [kept.mark() for _ in range(4)]
    assert found == [True, False, False, False]
    kept.cut()
    assert 9 * 24 <= kept.here <= 11 * 24


def test_gibibytes_bound_what_the_file_takes(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(journal, tmp_path, keep_gib=1.0)
    kept.send(20)
    assert not kept.mark()
    monkeypatch.setattr(type(journal.keeping), "nbytes", property(lambda _: 2 * 2**30))
    assert kept.mark()
    kept.cut()
    assert kept.here == 160 * 0.4, "to four fifths of the bound"


def test_room_that_is_free_does_not_count(journal: Journal, tmp_path: Path) -> None:
    kept = Kept(journal, tmp_path, keep_samples=60)
    kept.send(60)
    full = journal.keeping.nbytes
    assert kept.mark()
    kept.cut()
    assert journal.keeping.nbytes - len(journal.keeping.snapshot or b"") < full


def test_without_bounds_and_in_split_jobs_nothing_is_let_go(journal: Journal, tmp_path: Path) -> None:
    kept = Kept(journal, tmp_path)
    kept.send(6)
    assert not kept.mark()
    with pytest.raises(ConfigError, match="keep_days: split-lora keeps all batches"):
        TrainerConfig(job="j", method="split-lora", keep_days=3.0, tiers=kept.config.tiers).checked()


def arrived(listener: Listener, batches: list[tuple[FakeDevice, ActivationBatch]]) -> bool:
    """Send what is not receipted yet: the plan that was seen may be of a trainer that is gone."""
    waiting = [(device, batch) for device, batch in batches if receipted(listener, device) < batch.sequence]
    for device, batch in waiting:
        send(listener, device, batch)
    return not waiting


def test_a_running_trainer_lets_go_and_its_successor_goes_on(
    broker: InProcessBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("side_trainer.fold.retention._LOOK_EVERY_S", 0.0)
    settings, fleet = config(tmp_path, keep_samples=40, publish_every_s=0.0), devices()

    def here() -> int:
        with closing(Journal(tmp_path / FILE_NAME, read_only=True)) as journal:
            return sum(rows for _, rows in journal.batches(journal.tail))

    for life in range(2):
        with trainer(broker, settings):
            listener = Listener(broker.transport(f"watch-{life}"))
            plan = born(listener, fleet)
            batches = [(device, device.batch(plan)) for _ in range(3) for device in fleet]
            until(partial(arrived, listener, batches), "receipts")
            assert final(listener, 72 * (life + 1))
            until(lambda: here() <= 40, "the oldest are let go")
        versions = [
            unpack(WeightsManifest, one.payload)
            for one in listener.seen
            if one.topic == TOPICS.weights("big") and one.payload
        ]
        finals = [one.samples for one in versions if one.final and one.samples == 72 * (life + 1)]
        assert len(finals) == 1, "letting go makes no version"
        assert verify(tmp_path).matches


def test_verify_begins_at_the_snapshot_and_a_damaged_one_is_told(journal: Journal, tmp_path: Path) -> None:
    kept = Kept(journal, tmp_path, keep_samples=60)
    kept.send(12)
    assert kept.mark()
    kept.cut()
    kept.send(2)
    write_checkpoint(tmp_path, kept.fold, journal.run)
    verdict = verify(tmp_path)
    assert verdict.matches and verdict.begun_at > 0
    journal.db.execute("UPDATE snapshot SET payload = x'00'")
    with pytest.raises(StateError, match="its snapshot has changed"):
        verify(tmp_path)


def test_a_rebuild_takes_out_what_is_kept_and_says_what_is_beyond_it(
    journal: Journal, tmp_path: Path
) -> None:
    kept = Kept(journal, tmp_path, keep_samples=60)
    kept.send(12)
    assert kept.mark()
    kept.cut()
    kept.send(3)
    here = dict(journal.samples_by_stream(journal.tail))
    journal.close()
    found = rebuild(tmp_path, ["dev-1"])
    assert found.samples == here[kept.fleet[1].stream] and found.beyond == 40 - found.samples
    with closing(Journal(tmp_path / FILE_NAME)) as again:
        assert kept.fleet[1].stream not in dict(again.samples_by_stream(again.tail))
        folds = []
        for _ in range(2):
            fold = Fold(again)
            assert begin(fold, again)
            folds.append(fold_all(again, fold).digest())
        assert folds[0] == folds[1] != kept.fold.digest()
