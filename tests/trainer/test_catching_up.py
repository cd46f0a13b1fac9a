"""A trainer that falls behind learns from several batches at once; what it does so is data."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from side_trainer.fold.checkpoint import resume, write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import IdleRecord
from side_trainer.rows.training_rows import StoredBatch, gather
from side_trainer.settings.schema import LearnerSettings
from sidestream.contract.errors import StateError
from sidestream.contract.messages import ActivationBatch, to_bin
from sidestream.contract.tensors import Codec, Floats, decode, encode
from tests.trainer.conftest import FakeDevice, append, config, devices, fold_all, settle, steps
from tests.trainer.test_fold import filled


def test_batches_that_wait_share_an_update_up_to_so_many_rows(journal: Journal, tmp_path: Path) -> None:
    settings = config(tmp_path, learner=LearnerSettings(seed=5, replay=1, replay_rows=8, update_rows=20))
    job, fleet = Job(settings, journal), devices()
    settle(job, fleet)
    for rows in (8, 8, 8, 30, 8):
        assert append(journal, fleet[0], fleet[0].batch(job.plan, rows=rows))
    found, fold = list[int](), Fold(journal)
    for step in steps(journal, fold):
        if step.updates:
            assert step.updates == 2, "one on what came, one replayed"
            found.append(len(step.served))
    assert found == [2, 1, 1, 1], "a batch that is too large alone is not divided"
    assert fold.method.unlearnt == 0 and fold.samples == 62


def test_while_none_waits_each_batch_has_updates_of_its_own(journal: Journal, tmp_path: Path) -> None:
    job, fleet, fold = Job(config(tmp_path), journal), devices(), Fold(journal)
    settle(job, fleet)
    for device in fleet:
        assert append(journal, device, device.batch(job.plan))
        before = fold.updates
        ((tier, stream, _),) = [one for step in steps(journal, fold) for one in step.served]
        assert (tier, stream, fold.updates - before) == (device.tier, device.stream, 2)


def test_each_batch_of_an_update_is_judged_by_its_own_rows(journal: Journal, tmp_path: Path) -> None:
    job = filled(journal, tmp_path, batches=30, idle=False)
    fold = fold_all(journal, Fold(journal))
    for _ in range(4):
        idle = IdleRecord(phase=fold.offset, position=0, rows=240, total=240)
        journal.append("idle", msgspec.json.encode(idle))
        fold_all(journal, fold)
    alike, bent = (
        FakeDevice(name=name, tier="big", stream=name[0] * 32, seed=7) for name in ("alike", "bent")
    )
    settle(job, [alike, bent])
    wrong = bent.batch(job.plan, rows=40)
    targets = (wrong.read_targets().astype(np.int64) + 1) % 4
    assert append(journal, alike, alike.batch(job.plan, rows=40))
    assert append(journal, bent, msgspec.structs.replace(wrong, targets=to_bin(targets, "<u2")))
    losses = {stream: loss for step in steps(journal, fold) for _, stream, loss in step.served}
    assert losses["b" * 32] > 2 * losses["a" * 32]


def test_a_fold_that_stopped_between_batches_and_their_update_goes_on_to_the_same_bits(
    journal: Journal, tmp_path: Path
) -> None:
    filled(journal, tmp_path, batches=9, idle=False)
    early = Fold(journal)
    for record in journal.read(0):
        early.apply(record)
    assert early.method.unlearnt == 9
    write_checkpoint(tmp_path, early, journal.run)
    late = Fold(journal)
    assert resume(tmp_path, late, journal.run, journal.tail) is not None and late.method.unlearnt == 9
    assert fold_all(journal, late).digest() == fold_all(journal, Fold(journal)).digest()


def test_an_update_on_more_batches_than_wait_is_a_damaged_journal(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path, batches=2, idle=False)
    journal.append("learn", b'{"through":99}')
    with pytest.raises(StateError, match="damaged"):
        fold_all(journal, Fold(journal))


@given(
    codecs=st.lists(st.sampled_from([codec for codec in Codec if not codec.stages]), min_size=1, max_size=4),
    width=st.sampled_from([16, 64, 96, 128]),
    seed=st.integers(0, 2**16),
)
def test_rows_are_decoded_as_their_batches_are(codecs: list[Codec], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stored, whole = list[StoredBatch](), list[Floats]()
    for codec in codecs:
        lengths = rng.integers(1, 5, size=3)
        values = encode(rng.standard_normal((2, int(lengths.sum()), width)), codec)
        batch = ActivationBatch(
            stream="a" * 32,
            sequence=1,
            floor=1,
            fingerprint="f",
            labels_id="l",
            taps=(1, 2),
            sampling="all",
            samples=to_bin([0, 1, 2], "<u4"),
            lengths=to_bin(lengths, "<u2"),
            targets=to_bin([0, 1, 0], "<u2"),
            activations=values,
        )
        stored.append(StoredBatch.of("big", batch))
        whole.append(decode(values))
    picks = [(int(rng.integers(len(codecs))), int(rng.integers(3))) for _ in range(5)]
    got = gather([(stored[at], row) for at, row in picks], lambda tier: "m")
    ((_, taken),) = [(family.align, family.activations.numpy()) for family in got.families]
    for place, (at, row) in enumerate(picks):
        start, end = stored[at].starts[row], stored[at].starts[row + 1]
        np.testing.assert_array_equal(taken[:, place, : end - start], whole[at][:, start:end])
        assert not taken[:, place, end - start :].any() and got.mask[place].sum() == end - start
    for one, decoded in zip(stored, whole, strict=True):
        np.testing.assert_array_equal(one.decode(), decoded)
