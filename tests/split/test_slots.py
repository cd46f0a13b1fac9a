"""A device that goes on with a new stream is answered in its slots, whatever the one before still gets."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sidestream.contract.messages import ActivationBatch, GradientReply, unpack_adapter
from sidestream.contract.wire import pack, unpack
from tests.agent.tiny import save_tiny
from tests.split.fleet import config, fleet
from tests.split.test_method import first_batch, reply_in


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "bert", "bert")


def test_the_answer_to_a_batch_of_the_stream_before_does_not_take_the_place_of_one_that_is_awaited(
    tmp_path: Path, backbone: Path
) -> None:
    """Made within one step, the awaited one would never have been sent; nobody asks twice in a stream."""
    with fleet(tmp_path, config(tmp_path, backbone, split={"window": 2}), {"cut1": 8}) as made:
        batch, (device,) = unpack(ActivationBatch, first_batch(made)), made.devices
        assert batch.part is not None
        part = msgspec.structs.replace(batch.part, ticket=b"a lost 1")
        keys = bytes(byte ^ 255 for byte in batch.keys)
        lost = msgspec.structs.replace(batch, stream="cd" * 16, keys=keys, split=part)
        made.trainer.take(device.name, device.tier, pack(lost))
        receipt = made.trainer.take(device.name, device.tier, pack(batch))
        assert receipt is not None
        # The newer batch is served first, and the older one's answer is made in the same step.
        tickets = made.trainer.method.tickets
        made.trainer.catch_up()
        waiting = list(tickets.waiting)
        assert [tickets.waiting[one].stream for one in waiting] == ["cd" * 16, batch.stream]
        for offset in reversed(waiting):
            serve = msgspec.json.encode({"offsets": [offset], "progress": 0.0})
            made.trainer.journal.append("serve", serve)
        made.trainer.catch_up()
        made.trainer.replies.publish()
        found: GradientReply = reply_in(made, batch.part.slot)
        assert found.ticket == batch.part.ticket and found.gradient is not None


def test_rows_that_had_all_come_before_are_learnt_from_in_later_passes(
    tmp_path: Path, backbone: Path
) -> None:
    """As where a device begins anew with a copy of an outbox: its first pass counts already."""
    split = {"passes": 3, "reuse_below": 0.9, "window": 2}
    with fleet(tmp_path, config(tmp_path, backbone, split=split), {"cut1": 4}) as made:
        batch, (device,) = unpack(ActivationBatch, first_batch(made)), made.devices
        assert batch.part is not None
        another = msgspec.structs.replace(batch.part, ticket=b"another1")
        made.trainer.take(
            device.name, device.tier, pack(msgspec.structs.replace(batch, stream="cd" * 16, split=another))
        )
        made.run()
        records = made.trainer.journal.read(0, limit=1000)
        sent = [unpack(ActivationBatch, one.payload).part for one in records if one.kind == "batch"]
        assert [one.pass_number for one in sent if one is not None] == [0, 1]  # whole, once more
        reused = [unpack_adapter(one.payload) for one in records if one.kind == "reuse"]
        assert len(reused) == 1
        updates = [one for one in records if one.kind == "update"]
        assert len(updates) == 2, "both later passes were answered, and learnt"
