"""A batch that the broker no longer takes is cut up: its samples get through, and nothing waits behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.store.streams import Slot
from edge_agent.uplink.recut import recut
from sidestream.contract.messages import ActivationBatch, to_bin
from sidestream.contract.tasks import TargetForm
from sidestream.contract.tensors import Codec, decode, encode, error_bound
from sidestream.contract.wire import pack, unpack
from tests.agent.fake_trainer import TIER, FakeTrainer
from tests.agent.test_sender import DEVICE, Sending
from tests.contract.examples import SCALAR
from tests.outboxes import receipt_for
from tests.until import until

LENGTHS = (3, 1, 4, 1, 5, 2, 6)


def large(
    form: TargetForm = TargetForm.LABELS, codec: Codec = Codec.INT8, width: int = 64
) -> ActivationBatch:
    vectors = np.random.default_rng(3).standard_normal((2, sum(LENGTHS), width)).astype(np.float32)
    targets = range(sum(LENGTHS)) if form is TargetForm.TOKEN_LABELS else range(len(LENGTHS))
    return ActivationBatch(
        stream="0" * 32,
        sequence=1,
        floor=1,
        fingerprint="f",
        labels_id="l",
        taps=(1, 2),
        sampling="all",
        samples=to_bin(range(40, 40 + len(LENGTHS)), "<u4"),
        lengths=to_bin(LENGTHS, "<u2"),
        targets=to_bin(targets, "<f4" if form is TargetForm.VALUES else "<u2"),
        target_form=form,
        activations=encode(vectors, codec),
    )


@pytest.mark.parametrize("width", [32, 64, 80])
@pytest.mark.parametrize("codec", SCALAR)
def test_parts_hold_the_same_rows_as_the_whole(codec: Codec, width: int) -> None:
    whole = large(codec=codec, width=width)
    parts = list(recut(whole, (len(pack(whole)) + 40) // 2))
    assert len(parts) > 2 and max(len(pack(part)) for part in parts) <= (len(pack(whole)) + 40) // 2
    assert b"".join(part.samples for part in parts) == whole.samples
    assert b"".join(part.lengths for part in parts) == whole.lengths
    assert b"".join(part.targets for part in parts) == whole.targets
    together = np.concatenate([decode(part.activations) for part in parts], axis=1)
    if width == 64 or codec in (Codec.F32, Codec.F16, Codec.INT8):
        assert np.array_equal(together, decode(whole.activations))
    else:  # a block of 64 values holds some of two vectors
        bound = error_bound(decode(whole.activations), codec)
        assert together.shape == bound.shape and np.abs(together).max() <= 2 * np.abs(bound).max() + 4.0


@pytest.mark.parametrize("form", [TargetForm.LABELS, TargetForm.VALUES, TargetForm.TOKEN_LABELS])
def test_targets_stay_with_their_rows(form: TargetForm) -> None:
    whole = large(form)
    parts = [unpack(ActivationBatch, pack(part)) for part in recut(whole, 900)]
    told = [target for part in parts for target in part.read_targets().tolist()]
    assert told == whole.read_targets().tolist()


def test_one_row_stays_one_row() -> None:
    whole = large()
    assert [len(part.sample_ids) for part in recut(whole, 1)] == [1] * len(LENGTHS)


def test_what_fits_stays_whole() -> None:
    assert list(recut(large(), 10**6)) == [large()]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path, job="lights", device=DEVICE, tier=TIER, max_bytes=10**6) as outbox:
        yield outbox


def test_a_batch_in_the_outbox_that_is_too_large_is_named_and_its_samples_go_through(
    broker: InProcessBroker, trainer: FakeTrainer, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    def packed(slot: Slot) -> bytes:
        return pack(
            msgspec.structs.replace(
                large(), stream=slot.stream, sequence=slot.sequence, floor=slot.floor, previous=slot.previous
            )
        )

    def small(slot: Slot) -> bytes:
        part = next(recut(large(), 1))
        samples = to_bin([90 + slot.sequence], "<u4")
        return pack(
            msgspec.structs.replace(
                part, stream=slot.stream, sequence=slot.sequence, previous=slot.previous, samples=samples
            )
        )

    outbox.append_all([(small, 1), (packed, len(LENGTHS)), (small, 1)], Consumed())
    with Sending(broker, outbox, trainer, max_packet_bytes=1500, retry_s=0.2, window=20) as sending:
        trainer.wait(lambda t: t.rows() >= len(LENGTHS) + 2)
        until(lambda: _receipted(trainer, outbox, sending), "all is receipted")
    cut = {batch.sequence: batch for _, batch in trainer.received if batch.sequence > 3}
    assert sorted(one for batch in cut.values() for one in batch.read_targets().tolist()) == list(range(7))
    assert {1, 3} < {batch.sequence for _, batch in trainer.received}
    assert "batch 2 has" in caplog.text and "the broker takes 1500" in caplog.text


def _receipted(trainer: FakeTrainer, outbox: Outbox, sending: Sending) -> bool:
    last = max(batch.sequence for _, batch in trainer.received)
    sending.in_flight.receipted(outbox.streams.receipt(receipt_for(outbox, last)).sequences)
    return outbox.size()[0] == 0
