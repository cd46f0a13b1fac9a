"""Killed anywhere, on a network that loses and repeats: batches are served once, answers learnt once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import pytest

from side_trainer.fold.fold import Fold
from side_trainer.journal.records import ServeRecord
from sidestream.contract.messages import ActivationBatch, Reuse, ticket_of, unpack_adapter
from sidestream.contract.plan import RoundPlan
from sidestream.contract.tensors import Codec
from sidestream.contract.wire import unpack
from tests.agent.tiny import save_tiny
from tests.split.fleet import SplitFleet, config, fleet

HELD: Mapping[str, object] = {"passes": 3, "window": 2, "reuse_below": 0.01, "change_bits": 2}
LOCAL: Mapping[str, object] = {
    **HELD,
    "adapters": "local",
    "round": RoundPlan(batches=2, devices=1, deadline_s=1e-6),
}


def expected(made: SplitFleet, passes: int) -> set[tuple[str, bytes]]:
    """Device and ticket of every sending that there has to be."""
    found = set()
    for device in made.devices:
        with device.outbox.reading() as db:
            numbers = [one for (one,) in db.execute("SELECT id FROM split_batches")]
        for number in numbers:
            names = device.batches.get(number).body.names
            found |= {(device.name, ticket_of(names, one)) for one in range(passes)}
    return found


def check(made: SplitFleet, passes: int, *, held: bool) -> None:
    """Hold the journal against what the devices had to send."""
    trainer = made.trainer
    trainer.catch_up()
    sent: dict[int, tuple[str, bytes]] = {}
    served: Counter[tuple[str, bytes]] = Counter()
    answered: Counter[tuple[str, bytes]] = Counter()
    for record in trainer.journal.read(0, limit=100_000):
        if record.kind == "batch":
            part = unpack(ActivationBatch, record.payload).part
            assert part is not None
            sent[record.offset] = trainer.method.owner(record), part.ticket
        elif record.kind == "reuse":
            message = unpack_adapter(record.payload)
            assert isinstance(message, Reuse)
            sent[record.offset] = trainer.method.owner(record), message.ticket
        elif record.kind == "serve":
            for offset in msgspec.json.decode(record.payload, type=ServeRecord).offsets:
                served[sent[offset]] += 1
        elif record.kind == "update":
            answered[trainer.method.owner(record), unpack_adapter(record.payload).ticket] += 1
    wanted = expected(made, passes)
    assert set(served) == wanted and set(served.values()) == {1}
    if held:
        assert set(answered) == wanted and set(answered.values()) == {1}
        assert trainer.method.updates == 2 * len(wanted)
        assert not trainer.replies.outstanding
    again = Fold(trainer.journal)
    for record in trainer.journal.read(0, limit=100_000):
        again.apply(record)
    assert again.digest() == trainer.fold.digest()


def kills_in(tmp_path: Path, seeds: Iterable[int], split: Mapping[str, object]) -> int:
    """Lives of these seeds; return how often somebody was killed. In one or another a change was sent."""
    lives = [one_life(tmp_path, seed, split) for seed in seeds]
    assert any(changed for _, changed in lives)
    return sum(kills for kills, _ in lives)


def one_life(tmp_path: Path, seed: int, split: Mapping[str, object]) -> tuple[int, int]:
    """A job from the first row to the last; return the number of kills, and of changes that were sent."""
    backbone = tmp_path / "bert"
    if not backbone.exists():
        save_tiny(backbone, "bert")
    folder = tmp_path / str(seed)
    folder.mkdir()
    lots = random.Random(seed)
    settings = config(folder, backbone, cuts=(1, 2), split=split, codec=Codec.INT8)
    with fleet(folder, settings, {"cut1": 12, "cut2": 16}, lots=lots, seed=seed, chance=0.03) as made:
        made.run(now=lambda: lots.random() * 1e9)
        made.trainer.fate.chance = 0.0
        check(made, passes=3, held=split.get("adapters") != "local")
        changed = sum(device.outbox.counters()["batches_changed"] for device in made.devices)
        return made.trainer.fate.kills + sum(device.fate.kills for device in made.devices[:1]), changed


@pytest.mark.parametrize("block", range(3))
def test_every_batch_is_served_once_and_every_answer_learnt_once(tmp_path: Path, block: int) -> None:
    assert kills_in(tmp_path, range(10 * block, 10 * block + 4), HELD) > 5


def test_devices_that_keep_their_adapters_are_served_once_too(tmp_path: Path) -> None:
    assert kills_in(tmp_path, range(4), LOCAL) > 5


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_more_lives(tmp_path: Path, block: int) -> None:
    assert kills_in(tmp_path, range(1000 + 25 * block, 1003 + 25 * block), HELD) > 5
