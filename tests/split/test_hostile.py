"""What nobody should send, and odd moments: none of it stops a trainer or leaves a device waiting."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch

from side_trainer.fold.fold import Fold
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.operator.rebuild import rebuild
from side_trainer.receive.inbox import arrived
from side_trainer.split_lora.method import SplitLoraMethod
from side_trainer.split_lora.served_batch import Losses, ServedBatch
from side_trainer.split_lora.settling import SplitSettler
from sidestream.contract.errors import DecodeError
from sidestream.contract.messages import (
    ActivationBatch,
    AdapterGradient,
    Reuse,
    SplitPart,
    Status,
    unpack_adapter,
)
from sidestream.contract.plan import RoundPlan
from sidestream.contract.tensors import Codec, decode, encode
from sidestream.contract.wire import pack, unpack
from tests.agent.tiny import save_tiny
from tests.split.fleet import config, fleet, replaced
from tests.split.frozen import frozen_job
from tests.split.test_method import first_batch, gradient, reply_in, served, take


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "bert", "bert")


def test_a_frozen_devices_batch_under_a_new_stream_does_not_stop_the_trainer(
    tmp_path: Path, backbone: Path
) -> None:
    with frozen_job(tmp_path, config(tmp_path, backbone, method="split-frozen"), rows=8) as (journal, fold):
        batch = unpack(
            ActivationBatch, next(one for one in journal.read(0, limit=9) if one.kind == "batch").payload
        )
        before, moved = fold.digest(), pack(msgspec.structs.replace(batch, stream="cd" * 16))
        with journal.transaction():
            journal.append_batch(arrived(unpack(ActivationBatch, moved), moved, "cut1", "d"))
        fold.apply(journal.get(journal.tail))
        assert fold.digest() == before


def test_a_gradient_of_no_batch_moves_nothing(tmp_path: Path, backbone: Path) -> None:
    with fleet(tmp_path, config(tmp_path, backbone), {"cut1": 8}) as made:
        served(made)
        before = made.trainer.fold.digest()
        take(made, gradient(made, b"nobody's"))
        assert made.trainer.fold.digest() == before


def test_a_part_has_no_longer_context_than_rows() -> None:
    part = SplitPart(ticket=b"12345678", slot=0, context=bytes(2049))
    message = Reuse(stream="ab" * 16, sequence=1, floor=1, ticket=b"12345678", of=b"12345678", split=part)
    with pytest.raises(DecodeError, match="context"):
        unpack_adapter(pack(message))


def test_a_device_is_not_left_waiting_in_a_slot_that_a_smaller_window_has_not(
    tmp_path: Path, backbone: Path
) -> None:
    with fleet(tmp_path, config(tmp_path, backbone, split={"window": 2}), {"cut1": 8}) as made:
        (device,) = made.devices
        while len(device.waiting()) < 2:
            device.step()
        assert isinstance(device.exchange._window, int)
        device.exchange._window = 1
        device.exchange._ask_again()
        assert {one.slot for one in device.batches.flights()} == {0}


def test_a_batch_that_is_refused_is_no_longer_waited_for(tmp_path: Path, backbone: Path) -> None:
    from sidestream.contract.messages import content_digest

    with fleet(tmp_path, config(tmp_path, backbone), {"cut1": 8}) as made:
        batch, (device,) = unpack(ActivationBatch, first_batch(made)), made.devices
        assert device.batches.flights()
        assert device.outbox.refuse(batch.stream, batch.sequence, content_digest(batch))
        assert not device.batches.flights()


def test_an_answer_that_overflows_is_told_of_and_learnt_by_nobody(tmp_path: Path, backbone: Path) -> None:
    with fleet(tmp_path, config(tmp_path, backbone), {"cut1": 8}) as made:
        _, reply = served(made)
        (device,) = made.devices
        assert reply.gradient is not None
        huge = np.full(reply.gradient.shape, 3e38, np.float32)
        device.hear(pack(msgspec.structs.replace(reply, gradient=encode(huge, Codec.F32))))
        device.step()
        kinds = [one for one in device.waiting() if b"gradient" in one[:40]]
        assert not kinds and reply.ticket not in {one.ticket for one in device.batches.flights()}


def test_a_batch_of_which_rows_had_come_before_is_learnt_from_in_later_passes(
    tmp_path: Path, backbone: Path
) -> None:
    """A reuse of it is answered for the rows that stand for it."""
    settings = config(tmp_path, backbone, split={"passes": 2, "reuse_below": 0.9, "window": 2})
    with fleet(tmp_path, settings, {"cut1": 4}) as made:
        batch, (device,) = unpack(ActivationBatch, first_batch(made)), made.devices
        assert batch.part is not None
        another = msgspec.structs.replace(batch.part, ticket=b"another1")
        part = pack(msgspec.structs.replace(batch.select([0]), stream="cd" * 16, split=another))
        made.trainer.take(device.name, device.tier, part)
        made.run()
        updates = [one for one in made.trainer.journal.read(0, limit=100) if one.kind == "update"]
        found = [unpack_adapter(one.payload) for one in updates]
        assert [one.samples for one in found if isinstance(one, AdapterGradient)] == [3, 3]


def test_a_repeats_slot_outlives_a_checkpoint(tmp_path: Path, backbone: Path) -> None:
    with fleet(tmp_path, config(tmp_path, backbone, split={"window": 2}), {"cut1": 4}) as made:
        batch, (device,) = unpack(ActivationBatch, first_batch(made)), made.devices
        assert batch.part is not None
        made.trainer.take(device.name, device.tier, pack(batch))
        again = msgspec.structs.replace(
            batch, stream="cd" * 16, split=msgspec.structs.replace(batch.part, slot=1)
        )
        made.trainer.take(device.name, device.tier, pack(again))
        made.trainer.catch_up()
        made.trainer.checkpoint()
        made.restart_trainer()
        made.trainer.serve()
        assert reply_in(made, 1).gradient is not None


def test_what_waited_in_an_earlier_stream_takes_no_slot_that_the_device_has_given_anew(
    tmp_path: Path, backbone: Path
) -> None:
    with fleet(tmp_path, config(tmp_path, backbone, split={"window": 2}), {"cut1": 12}) as made:
        device = made.devices[0]
        while len(device.waiting()) < 2:
            device.step()
        answered, waiting = (unpack(ActivationBatch, one) for one in device.waiting())
        assert answered.part is not None and waiting.part is not None
        made.trainer.take(device.name, device.tier, pack(answered))
        made.trainer.serve()
        made.trainer.take(device.name, device.tier, pack(waiting))
        slot = waiting.part.slot
        again = msgspec.structs.replace(
            answered, stream="cd" * 16, split=msgspec.structs.replace(answered.part, slot=slot)
        )
        made.trainer.take(device.name, device.tier, pack(again))
        made.trainer.serve()
        assert reply_in(made, slot).ticket == answered.part.ticket


def test_a_device_that_hears_nothing_for_long_asks_again(tmp_path: Path, backbone: Path) -> None:
    with fleet(tmp_path, config(tmp_path, backbone, split={"window": 2}), {"cut1": 8}) as made:
        device, now = made.devices[0], [0.0]
        device.clock = lambda: now[0]
        device.again()
        while device.step():
            pass
        for payload in device.waiting():
            receipt = made.trainer.take(device.name, device.tier, payload)
            assert receipt is not None
            device.receipted(receipt)
        now[0] = 299.0
        assert not device.step() and not device.waiting()
        now[0] = 301.0
        assert device.step()
        made.run()
        counts = [one.kind for one in made.trainer.journal.read(0, limit=100)]
        assert counts.count("batch") == counts.count("serve") == 2


def test_rounds_are_counted_whoever_is_taken_out(tmp_path: Path, backbone: Path) -> None:
    plan = RoundPlan(batches=1, devices=1, deadline_s=1e-6)
    settings = config(tmp_path, backbone, split={"adapters": "local", "round": plan})
    with fleet(tmp_path, settings, {"cut1": 8, "cut1/b": 8}) as made:
        clock = iter(range(10**6))
        made.run(now=lambda: float(next(clock)))
        rounds, folder = made.trainer.method.rounds, made.trainer.folder
        assert rounds > 1
    rebuild(folder, ["d0", "d1"])
    journal = Journal(folder / FILE_NAME)
    fold = Fold(journal)
    for record in journal.read(0, limit=1000):
        fold.apply(record)
    assert isinstance(fold.method, SplitLoraMethod) and fold.method.rounds == rounds
    journal.close()


def test_a_device_weighs_no_more_than_what_it_was_answered_for(tmp_path: Path, backbone: Path) -> None:
    plan = RoundPlan(batches=1, devices=1, deadline_s=1e-6)
    settings = config(tmp_path, backbone, split={"adapters": "local", "round": plan})
    with fleet(tmp_path, settings, {"cut1": 8}) as made:
        rounds = made.trainer.method.averaging
        rounds._served[0] = {"d0": 4}
        assert (rounds._weight("d0", 2**31), rounds._weight("d0", 3), rounds._weight("d1", 9)) == (4, 3, 1)


def test_a_journal_that_was_set_back_gets_several_rounds_at_once(tmp_path: Path, backbone: Path) -> None:
    plan = RoundPlan(batches=1, devices=1, deadline_s=1e-6)
    settings = config(tmp_path, backbone, split={"adapters": "local", "round": plan})
    (tmp_path / "again").mkdir()
    with fleet(tmp_path, settings, {"cut1": 8}) as made:
        clock = iter(range(10**6))
        made.run(now=lambda: float(next(clock)))
        rounds = made.trainer.method.rounds
        assert rounds > 1
        sent = [
            one.payload
            for one in made.trainer.journal.read(0, limit=100)
            if one.kind in ("batch", "reuse", "upload")
        ]
        device = made.devices[0]
        with fleet(tmp_path / "again", replaced(settings, state_dir=str(tmp_path / "new")), {}) as other:
            for payload in sent:
                other.trainer.take(device.name, device.tier, payload)
            other.run(now=lambda: float(next(clock)))
            assert other.trainer.method.rounds == rounds


def test_rows_without_a_target_give_no_gradient_rather_than_none_that_is_a_number() -> None:
    """They share an update with other devices' batches."""
    losses = Losses(objective=cast(Any, None), smoothing=0.0, scale=cast(Any, None))
    batch = ServedBatch(
        states=np.ones((2, 3), np.float32),
        lengths=np.array([2]),
        targets=np.zeros(0, np.int64),
        told=np.zeros(2, np.bool_),
        keys=b"12345678",
        whole=True,
    )
    answers = torch.ones((2, 3), requires_grad=True)
    model = SimpleNamespace(head=object())
    losses.of(cast(Any, model), answers, batch, np.zeros(3)).backward()  # type: ignore[no-untyped-call]
    assert answers.grad is not None and not answers.grad.any()


def test_a_device_that_does_not_tell_its_memory_is_told_of(
    tmp_path: Path, backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tmp_path, backbone)
    tiers = {"cut1": msgspec.structs.replace(settings.tiers["cut1"], cut="auto")}
    settler = SplitSettler(replaced(settings, tiers=tiers), cast(Any, None))
    assert settler.settle("cut1", cast(Status, SimpleNamespace(memory_bytes=0)), {}) is None
    assert "tiers.cut1.cut" in caplog.text and "give a number" in caplog.text


def test_batches_that_share_an_update_are_answered_as_each_would_be_alone(
    tmp_path: Path, backbone: Path
) -> None:
    found = []
    for most in (1, 2):
        folder = tmp_path / str(most)
        folder.mkdir()
        settings = config(folder, backbone, learner={"serve_together": most, "schedule": "fifo"})
        with fleet(folder, settings, {"cut1": 4, "cut1/b": 4}) as made:
            model, lots = made.trainer.method.model, np.random.default_rng(1)
            begun = model.arrays()  # with a head of zeros there is nothing to answer
            drawn = {name: lots.normal(0, 0.1, begun[name].shape).astype("f4") for name in sorted(begun)}
            model.load(drawn)
            for device in made.devices:
                while not device.waiting():
                    device.step()
                made.trainer.take(device.name, device.tier, device.waiting()[0])
            made.trainer.serve()
            assert len(made.trainer.method.tickets.waiting) == 2 - most
            answer = reply_in(made).gradient
            assert answer is not None
            found.append(decode(answer))
            assert found[-1].any()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-7)
