"""A real trainer that chooses, and a real device that goes by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from broker_config.testing.inprocess import InProcessBroker
from side_trainer.operator.audit import verify
from side_trainer.operator.tuning import chosen
from sidestream.contract.messages import ActivationBatch, Assignment
from sidestream.contract.wire import unpack
from tests.e2e.in_process import TOPICS, Kind, accuracies, agent, settings, table, told
from tests.trainer.test_trainer import Listener, trainer
from tests.until import until

TIER = "pi"
TUNED = """\
autotune = true
[tuning]
window_h = 0.0002
batch_seconds = 1e-9
batch_size_min = 2
max_tokens_min = 128
"""
"""No forward pass is as fast as that: batches become as small as may be, in windows of .7 s."""


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    torch.set_num_threads(1)
    with InProcessBroker(max_packet_bytes=2_000_000) as running:
        yield running


class Watched:
    """A device's file that grows for as long as something is waited for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = len(path.read_text().splitlines())

    def more(self, count: int = 4) -> None:
        with self.path.open("a") as file:
            for _ in range(count):
                self.rows += 1
                file.write(json.dumps({"text": f"warm number {self.rows}", "label": "cold"}) + "\n")


def sizes(listener: Listener) -> list[int]:
    topic = TOPICS.activations(TIER, f"{TIER}-1")
    return [
        len(unpack(ActivationBatch, event.payload).sample_ids)
        for event in list(listener.seen)
        if event.topic == topic
    ]


def assigned(listener: Listener) -> Assignment | None:
    return listener.last(TOPICS.assignment(TIER, f"{TIER}-1"), Assignment)


@pytest.mark.slow
def test_a_slow_device_gets_smaller_batches_and_a_restarted_trainer_says_the_same(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    file = settings(tmp_path, table(tmp_path, TIER, Kind("bert", 3, 32)), passes=1, more=TUNED)
    listener = Listener(broker.transport("watch"))
    with agent(broker, tmp_path, TIER, samples=40) as data:
        watched = Watched(data)

        def goes_by_the_least() -> bool:
            watched.more()
            word, said = told(listener, TIER), assigned(listener)
            least = said is not None and said.batch_size == 2
            return bool(least and word and said and word.assignment == said.version)

        with trainer(broker, file.load()):
            until(goes_by_the_least, "the device makes the smallest batches", every_s=0.1)
            before = assigned(listener)
            assert before is not None and (before.max_tokens, before.sampling) == (128, "segments:4")
            made = len(sizes(listener))

            def sends_small_ones() -> bool:
                watched.more()
                return len(sizes(listener)) > made + 4

            until(sends_small_ones, "more batches", every_s=0.1)
            assert max(sizes(listener)) > 2 and max(sizes(listener)[made + 2 :]) == 2
            accuracies(listener, {TIER: watched.rows})
        assert verify(tmp_path / "trainer").matches
        known = chosen(tmp_path / "trainer", f"{TIER}-1")
        assert [one.choice.batch_size for one in known] == [4, 2]
        with trainer(broker, file.load()):
            until(lambda: (said := assigned(listener)) and said.fence > before.fence, "it says so again")
            after = assigned(listener)
            assert after is not None
            assert (after.version, after.batch_size) == (before.version, before.batch_size)
            watched.more(8)
            accuracies(listener, {TIER: watched.rows})
        assert verify(tmp_path / "trainer").matches
        assert chosen(tmp_path / "trainer", f"{TIER}-1")[:2] == known
