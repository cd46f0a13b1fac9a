"""Weights are a fold over the journal: the same records give the same bits, from wherever one starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from side_trainer.fold.checkpoint import resume, write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.decoded import Decoded, DecodedBatches
from side_trainer.journal.file import digest_of
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import IdleRecord
from side_trainer.rows.training_rows import Ints, MiniBatch, RowStore, StoredBatch, gather
from side_trainer.settings.schema import LearnerSettings
from sidestream.contract.errors import StateError
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.tensors import Codec, decode
from sidestream.contract.wire import pack, unpack
from tests.trainer.conftest import append, config, devices, fold_all, learnt, settle


def filled(journal: Journal, tmp_path: Path, *, batches: int = 12, idle: bool = True) -> Job:
    """A journal with batches of unequal devices, and an idle phase that crosses passes."""
    job = Job(config(tmp_path), journal)
    fleet = devices()
    settle(job, fleet)
    for index in range(batches):
        device = fleet[index % len(fleet)]
        assert append(journal, device, device.batch(job.plan, label=index // 3 % 3))
    phase, rows = journal.tail, 8 * batches
    if idle:
        for position in range(0, 2 * rows, 40):
            record = IdleRecord(phase=phase, position=position, rows=40, total=2 * rows)
            journal.append("idle", msgspec.json.encode(record))
    return job


@pytest.mark.slow
def test_the_same_journal_gives_the_same_bits(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path)
    first, second = fold_all(journal, Fold(journal)), fold_all(journal, Fold(journal))
    assert first.digest() == second.digest()


@pytest.mark.slow
def test_a_fold_resumed_from_any_checkpoint_ends_with_the_same_bits(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path)
    whole = fold_all(journal, Fold(journal))
    for stop in range(0, journal.tail, 3):
        directory = tmp_path / str(stop)
        directory.mkdir()
        early = Fold(journal)
        for record in journal.read(0, limit=stop):
            early.apply(record)
        write_checkpoint(directory, early, journal.run)
        late = Fold(journal)
        found = resume(directory, late, journal.run, journal.tail)
        assert found is not None and found.about.offset == stop
        assert fold_all(journal, late).digest() == whole.digest(), stop
        assert late.updates == whole.updates and learnt(late).order.idle_rows == learnt(whole).order.idle_rows


@pytest.mark.slow
def test_a_small_row_cache_changes_nothing(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path)
    assert (
        fold_all(journal, Fold(journal, cache_bytes=1)).digest() == fold_all(journal, Fold(journal)).digest()
    )


@pytest.mark.slow
def test_torch_randomness_outside_does_not_leak_in_nor_out(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path, batches=4)
    torch.manual_seed(1)
    first = fold_all(journal, Fold(journal)).digest()
    after = torch.rand(1).item()
    torch.manual_seed(1)
    assert torch.rand(1).item() == after
    torch.manual_seed(2)
    assert fold_all(journal, Fold(journal)).digest() == first


def test_a_damaged_journal_is_told_and_not_folded(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path, batches=4, idle=False)
    batch = journal.batches(journal.tail)[1][0]
    journal.db.execute("UPDATE records SET payload = x'80' WHERE offset = ?", (batch,))
    with pytest.raises(StateError, match=f"record {batch} has changed; restore"):
        fold_all(journal, Fold(journal))
    journal.db.execute("UPDATE records SET digest = ? WHERE offset = ?", (digest_of(b"\x80"), batch))
    with pytest.raises(StateError, match=f"record {batch} cannot be folded"):
        fold_all(journal, Fold(journal))
    journal.db.execute("DELETE FROM records WHERE offset = ?", (batch,))
    with pytest.raises(StateError, match=f"record {batch} is missing"):
        fold_all(journal, Fold(journal))


@pytest.mark.slow
def test_a_tier_short_of_a_label_still_answers_with_it(journal: Journal, tmp_path: Path) -> None:
    """The deep tier's rows have one label of four but for a few; the shallow tier teaches the others."""
    settings = config(tmp_path, learner=LearnerSettings(seed=5, pass_rows=16))
    job = Job(settings, journal)
    deep, shallow, _ = fleet = devices()
    settle(job, fleet)
    for index in range(40):
        assert append(journal, deep, deep.batch(job.plan, label=0 if index % 20 else 1))
        assert append(journal, shallow, shallow.batch(job.plan))
    rows = 8 * 80
    record = IdleRecord(phase=journal.tail, position=0, rows=4 * rows, total=4 * rows)
    journal.append("idle", msgspec.json.encode(record))
    fold = fold_all(journal, Fold(journal))
    average = learnt(fold).average
    assert average is not None
    deep.rng = np.random.default_rng(1234)
    asked = StoredBatch.read("big", pack(deep.batch(job.plan, rows=200)))
    batch = gather(((asked, row) for row in range(200)), lambda _: "m")
    answers = average.eval().predict("m", batch.families[0].activations, batch.mask).argmax(dim=-1)
    assert (answers == batch.targets).float().mean() > 0.9


@pytest.mark.slow
def test_a_block_that_stands_apart_learns_to_answer_by_itself(journal: Journal, tmp_path: Path) -> None:
    settings = config(tmp_path, learner=LearnerSettings(seed=5, pass_rows=16))
    job = Job(settings, journal)
    deep, *_ = fleet = devices()
    settle(job, fleet)
    for _ in range(40):
        assert append(journal, deep, deep.batch(job.plan))
    fold = fold_all(journal, Fold(journal))
    average = learnt(fold).average
    assert average is not None
    asked = StoredBatch.read("big", pack(deep.batch(job.plan, rows=200)))
    batch = gather(((asked, row) for row in range(200)), lambda _: "m")
    alone = average.eval().answers([("m", batch.families[0].activations)], batch.mask).alone
    assert (alone[3].argmax(dim=-1) == batch.targets).float().mean() > 0.9


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    digests = set()
    for seed in (1, 2):
        directory = tmp_path / str(seed)
        directory.mkdir()
        journal = Journal(directory / "journal.db")
        settings = config(directory)
        settings = msgspec.structs.replace(
            settings, learner=msgspec.structs.replace(settings.learner, seed=seed)
        )
        job = Job(settings, journal)
        fleet = devices()
        settle(job, fleet)
        append(journal, fleet[0], fleet[0].batch(job.plan))
        digests.add(fold_all(journal, Fold(journal)).digest())
        journal.close()
    assert len(digests) == 2


@pytest.mark.slow
def test_it_learns_what_the_rows_show(journal: Journal, tmp_path: Path) -> None:
    job = filled(journal, tmp_path, batches=60)
    fold = fold_all(journal, Fold(journal))
    network = learnt(fold).network
    assert network is not None
    network.eval()
    for device in devices():
        device.rng = np.random.default_rng(1234)
        batch = device.batch(job.plan, rows=64)
        stored = StoredBatch.read(device.tier, pack(batch))
        rows = gather(((stored, row) for row in range(64)), lambda _: "m")
        family = rows.families[0]
        answer = network.predict(family.align, family.activations, rows.mask).argmax(dim=-1)
        shown = rows.targets < 3  # the fourth label was never sent
        assert (answer == rows.targets)[shown].float().mean() > 0.9, device.tier


def test_the_logit_adjustment_equals_the_formula(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path, batches=3, idle=False)
    fold = fold_all(journal, Fold(journal))
    counts = {name: np.zeros(4) for name in ("big", "small")}
    for offset, _ in journal.batches(journal.tail):
        record = journal.get(offset)
        assert record.tier is not None
        counts[record.tier] += np.bincount(StoredBatch.read("", record.payload).targets, minlength=4)
    fleet, deep = (count + 1 for count in (counts["big"] + counts["small"], counts["big"]))
    expected = np.log(deep / deep.sum()) - np.log(fleet / fleet.sum())
    np.testing.assert_allclose(learnt(fold)._loss.adjustment("big", 3), expected, rtol=1e-5)
    for tier in counts:
        assert not learnt(fold)._loss.adjustment(tier, 2).any(), "at two taps all rows teach both"


def test_what_the_inbox_has_unpacked_is_not_unpacked_again_and_gives_the_same_bits(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(journal, tmp_path, batches=4)
    for record in journal.read(0):
        if record.kind == "batch":
            batch = unpack(ActivationBatch, record.payload)
            journal.decoded.put(record.offset, Decoded(batch, decode(batch.activations)))
    with monkeypatch.context() as patched:
        patched.setattr("side_trainer.rows.training_rows.unpack", None)
        handed_on = fold_all(journal, Fold(journal)).digest()
    assert fold_all(journal, Fold(journal)).digest() == handed_on


def test_what_is_handed_on_is_bounded_and_what_was_passed_is_forgotten(
    journal: Journal, tmp_path: Path
) -> None:
    device, *_ = fleet = devices()
    job = Job(config(tmp_path), journal)
    settle(job, fleet)
    one = Decoded(device.batch(job.plan), np.zeros((1, 4, 16), np.float32))
    handed = DecodedBatches(max_bytes=2 * one.values.nbytes)
    for offset in (3, 4, 5):
        handed.put(offset, one)
    assert handed.take(5) is None and handed.take(3) is None, "it had no room, and is past"
    handed.put(5, one)
    handed.put(6, one)
    handed.put(7, one)
    assert handed.take(6) is one and handed.take(6) is None and handed.take(7) is one


@pytest.mark.slow
def test_idle_slices_cover_every_row_once_a_pass(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path, batches=5, idle=False)
    fold = fold_all(journal, Fold(journal))
    seen: list[int] = []
    method = learnt(fold)
    method._mini_batch = _recording(method._mini_batch, seen)  # type: ignore[method-assign,assignment]
    phase = journal.tail
    for position in range(0, 80, 16):
        record = IdleRecord(phase=phase, position=position, rows=16, total=80)
        journal.append("idle", msgspec.json.encode(record))
    fold_all(journal, fold)
    assert sorted(seen[:40]) == list(range(40)) and sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]


def _recording(original: Callable[[Ints], MiniBatch], seen: list[int]) -> Callable[[Ints], MiniBatch]:
    def record(rows: Ints) -> MiniBatch:
        seen.extend(rows.tolist())
        return original(rows)

    return record


def test_row_numbers_find_their_batches(journal: Journal) -> None:
    store = RowStore(journal, cache_bytes=1)
    for offset, rows in ((2, 3), (5, 1), (6, 4)):
        store.add(offset, rows)
    assert store.locate(np.arange(8)) == [(2, 0), (2, 1), (2, 2), (5, 0), (6, 0), (6, 1), (6, 2), (6, 3)]
    assert [store.rows_before(offset) for offset in (1, 2, 3, 5, 6, 7)] == [0, 0, 3, 3, 4, 8]


def test_half_of_the_cache_is_for_decoded_batches(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path, batches=8, idle=False)
    offsets = [offset for offset, _ in journal.batches(journal.tail)]
    written = [RowStore(journal, cache_bytes=1).batch(offset) for offset in offsets]
    assert all(one.codec is not Codec.F32 for one in written)
    room = 2 * sum(one.decoded_nbytes for one in written[:3])
    store = RowStore(journal, cache_bytes=room)
    kept = [store.batch(offset) for offset in offsets]
    assert [one.codec is Codec.F32 for one in kept[:4]] == [True, True, True, False]
    assert all(one.nbytes == same.decoded_nbytes for one, same in zip(kept[:3], written, strict=False))
    for one, same in zip(kept, written, strict=True):
        np.testing.assert_array_equal(one.decode(), same.decode())


def test_what_is_let_go_makes_room_for_decoded_batches(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path, batches=8, idle=False)
    batches = journal.batches(journal.tail)
    offsets, plain = [offset for offset, _ in batches], RowStore(journal, cache_bytes=1)
    store = RowStore(journal, cache_bytes=2 * max(plain.batch(offset).decoded_nbytes for offset in offsets))
    for offset, rows in batches:
        store.add(offset, rows)
    assert [store.batch(offset).codec is Codec.F32 for offset in offsets[:2]] == [True, False]
    store.drop_before(offsets[2])
    assert store.batch(offsets[3]).codec is Codec.F32


_PRODUCTS = """
import hashlib
import numpy as np
from threadpoolctl import threadpool_info
from side_trainer.fold.processors import set_threads
set_threads(2)
drawn = np.random.default_rng(0).standard_normal((2, 384, 384), dtype=np.float32)
found = [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]
print(hashlib.sha256((drawn[0, :64] @ drawn[1].T).tobytes()).hexdigest(), found)
"""


def test_products_are_the_same_on_any_number_of_processors() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", _PRODUCTS],
            env={**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for threads in ("1", "2", "4")
    }
    assert len(said) == 1 and said.pop().strip().endswith("[1]")


@pytest.mark.parametrize("rows", [1, 7])
def test_mixed_tiers_are_gathered_deepest_first(journal: Journal, tmp_path: Path, rows: int) -> None:
    job = Job(config(tmp_path), journal)
    fleet = devices()
    settle(job, fleet)
    for device in fleet[:2]:
        append(journal, device, device.batch(job.plan, rows=rows))
    fold = fold_all(journal, Fold(journal))
    offsets = [offset for offset, _ in journal.batches(journal.tail)]
    picks = [(learnt(fold).rows.batch(offset), row) for row in range(rows) for offset in reversed(offsets)]
    batch = gather(picks, lambda _: "m")
    assert batch.tiers == ["big"] * rows + ["small"] * rows
    assert [len(family.activations) for family in batch.families] == [3, 2]
    assert batch.mask.any(dim=1).all()
