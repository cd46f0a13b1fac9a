"""What a fold makes of few rows, and of devices whose labels are wrong."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from side_trainer.fold.checkpoint import resume, write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.rows.drawn_rows import RowFeatures
from side_trainer.rows.training_rows import StoredBatch
from side_trainer.settings.schema import LearnerSettings
from side_trainer.side_tuning.linear_starts import share_of
from sidestream.contract.messages import to_bin
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import pack
from sidestream.side_network.bundle import decode_bundle
from sidestream.side_network.inference import InferenceNetwork
from tests.trainer.conftest import LABELS, FakeDevice, append, config, fold_all, learnt, settle, steps


def fleet_of(count: int) -> list[FakeDevice]:
    return [
        FakeDevice(
            name=f"dev-{index}", tier="small" if index % 2 else "big", stream=f"{index:032x}", seed=index
        )
        for index in range(count)
    ]


def journaled(
    journal: Journal, folder: Path, *, devices: int, batches: int, wrong: int = 0, **learner: object
) -> Job:
    """Devices in turn, the first ``wrong`` of which move each label on to the next."""
    settings = {"seed": 5, "passes": 2, "replay": 1, "pass_rows": 8, "replay_rows": 8, "least_updates": 0}
    job = Job(config(folder, learner=LearnerSettings(**{**settings, **learner})), journal)  # type: ignore[arg-type]
    fleet = fleet_of(devices)
    settle(job, fleet)
    for _ in range(batches):
        for index, device in enumerate(fleet):
            batch = device.batch(job.plan)
            if index < wrong:
                moved = (np.asarray(batch.read_targets()).astype(int) + 1) % len(LABELS)
                batch = msgspec.structs.replace(batch, targets=to_bin(moved, "<u2"))
            assert append(journal, device, batch)
    return job


def idle(journal: Journal, fold: Fold, passes: float = 2.0) -> int:
    """Idle until nothing is owed; return the updates that it took."""
    before = fold_all(journal, fold).updates
    while fold.method.owed(passes) > 0:
        record = fold.method.next_idle(passes, 8, fold.offset)
        journal.append("idle", msgspec.json.encode(record))
        fold_all(journal, fold)
    return fold.updates - before


def accuracy(fold: Fold, job: Job, tier: str, *, probe: bool = False) -> float:
    """Of what a device of a tier is given, on samples that nobody has sent."""
    network = InferenceNetwork(decode_bundle(fold.method.bundles("0" * 32, 1, "int8")[tier]))
    device = FakeDevice(name="x", tier=tier, stream="f" * 32, seed=99)
    asked = StoredBatch.read(tier, pack(device.batch(job.plan, rows=200)))
    ask = network.probe if probe else network.predict
    answers = ask("m", asked.decode(), np.diff(asked.starts))
    assert answers is not None
    return float((answers.argmax(axis=1) == asked.targets).mean())


def test_after_two_batches_there_is_a_linear_answer_already(journal: Journal, tmp_path: Path) -> None:
    job = journaled(journal, tmp_path, devices=1, batches=2)
    fold = fold_all(journal, Fold(journal))
    assert learnt(fold).average is not None
    assert accuracy(fold, job, "big", probe=True) > 0.7 and accuracy(fold, job, "big") > 0.7


def test_without_a_linear_start_there_is_none(journal: Journal, tmp_path: Path) -> None:
    journaled(journal, tmp_path, devices=2, batches=4, linear_start=False)
    fold = fold_all(journal, Fold(journal))
    assert idle(journal, fold) and not any(name.startswith("starts.") for name in fold.weights())


def test_each_tier_gets_the_start_of_its_own_taps_and_all_rows_teach_the_shallow_one(
    journal: Journal, tmp_path: Path
) -> None:
    job = journaled(journal, tmp_path, devices=2, batches=8)
    fold = fold_all(journal, Fold(journal))
    bundles = {tier: decode_bundle(one) for tier, one in fold.method.bundles("0" * 32, 1, "int8").items()}
    assert {tier: one.about.starts for tier, one in bundles.items()} == {
        "big": {"m": (3,)},
        "small": {"m": (2,)},
    }
    assert min(accuracy(fold, job, tier, probe=True) for tier in bundles) > 0.8


def test_a_start_counts_the_less_the_more_rows_there_are_and_never_nothing() -> None:
    assert share_of(10, 0) == share_of(320, 0) == 1
    assert share_of(640, 0) == 0.5 and share_of(100_000, 0) == share_of(10**7, 0.1) == 0.25


def test_a_start_counts_more_where_rows_left_out_leave_it_unsure() -> None:
    assert share_of(100_000, 0.25) == 0.5 and share_of(100_000, 0.5) == share_of(100_000, 1) == 1


def test_few_rows_get_as_many_updates_as_asked_for(journal: Journal, tmp_path: Path) -> None:
    journaled(journal, tmp_path, devices=1, batches=2, least_updates=50)
    fold = Fold(journal)
    assert idle(journal, fold) and fold.updates == 50
    assert fold.method.owed(0) == 0


def test_rows_that_join_others_get_their_part_of_the_updates(journal: Journal, tmp_path: Path) -> None:
    job = journaled(journal, tmp_path, devices=1, batches=4, least_updates=60)
    fold = Fold(journal)
    idle(journal, fold)
    late = fleet_of(3)[2]
    for _ in range(2):  # a third of all rows, with two updates each
        assert append(journal, late, late.batch(job.plan))
        fold_all(journal, fold)
    assert fold.method.owed(2) == (60 / 3 - 2 * 2) * 8


def test_updates_still_owed_when_rows_come_stay_owed(journal: Journal, tmp_path: Path) -> None:
    job = journaled(journal, tmp_path, devices=1, batches=4, least_updates=60)
    fold = fold_all(journal, Fold(journal))
    journal.append("idle", msgspec.json.encode(fold.method.next_idle(2, 8, fold.offset)))
    left = fold_all(journal, fold).method.owed(2)
    late = fleet_of(3)[2]
    assert left > 0 and append(journal, late, late.batch(job.plan))
    assert fold_all(journal, fold).method.owed(2) > left


def test_many_rows_get_their_passes_and_no_more(journal: Journal, tmp_path: Path) -> None:
    journaled(journal, tmp_path, devices=1, batches=30, least_updates=20)
    fold = Fold(journal)
    assert idle(journal, fold) == 2 * 30 * 8 / 8


@pytest.mark.slow
def test_devices_with_wrong_labels_are_left_out_and_the_others_learn_as_without_them(
    journal: Journal, tmp_path: Path
) -> None:
    job = journaled(journal, tmp_path, devices=8, batches=10, wrong=2)
    fold, doubted = Fold(journal), list[str]()
    for step in steps(journal, fold):
        doubted += step.doubted
    idle(journal, fold)
    assert sorted(doubted) == ["dev-0", "dev-1"], "each is told of once"
    weights = learnt(fold).devices.values
    assert weights[:2].tolist() == [0, 0] and (weights[2:] == 1).all()
    assert min(accuracy(fold, job, tier) for tier in ("big", "small")) > 0.9


def test_a_device_that_sends_more_than_its_share_counts_for_no_more(journal: Journal, tmp_path: Path) -> None:
    job = journaled(journal, tmp_path, devices=8, batches=2, device_share=0.3)
    eager = fleet_of(1)[0]
    eager.sequence, eager.samples = 2, 16
    for _ in range(20):
        assert append(journal, eager, eager.batch(job.plan))
    fold = Fold(journal)
    idle(journal, fold)
    weight = float(learnt(fold).devices.values[0])
    rows = 22 * 8 * weight
    assert rows / (rows + 7 * 16) == pytest.approx(0.3)


@pytest.mark.slow
def test_rows_that_are_drawn_again_are_not_decoded_again(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journaled(journal, tmp_path, devices=2, batches=2)
    rows = learnt(fold_all(journal, Fold(journal))).rows
    offsets = [offset for offset, _ in journal.batches(journal.tail)]
    decoded, decode = list[int](), StoredBatch.decode

    def counting(batch: StoredBatch) -> Floats:
        decoded.append(len(batch.targets))
        return decode(batch)

    monkeypatch.setattr(StoredBatch, "decode", counting)
    kept = RowFeatures(rows)
    first = [kept.of(offset).copy() for offset in offsets]
    again = [kept.of(offset) for offset in offsets]
    assert len(decoded) == len(offsets)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    few = RowFeatures(rows, kept_bytes=2 * first[0].nbytes)
    for offset in (*offsets[:3], *offsets[1:3], offsets[0]):
        few.of(offset)
    assert len(decoded) == 2 * len(offsets), "room for two: the third drove the first out, and no other"


def test_a_fold_resumed_anywhere_ends_with_the_same_bits(journal: Journal, tmp_path: Path) -> None:
    journaled(journal, tmp_path, devices=6, batches=6, wrong=1, least_updates=40)
    whole = Fold(journal)
    idle(journal, whole)
    for stop in range(4, journal.tail, 7):
        directory = tmp_path / str(stop)
        directory.mkdir()
        early = Fold(journal)
        for record in journal.read(0, limit=stop):
            early.apply(record)
        write_checkpoint(directory, early, journal.run)
        late = Fold(journal)
        assert resume(directory, late, journal.run, journal.tail) is not None
        assert fold_all(journal, late).digest() == whole.digest(), stop
        assert late.method.owed(2) == whole.method.owed(2)
