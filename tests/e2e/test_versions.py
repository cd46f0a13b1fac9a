"""Devices get the versions that they ask the real trainer for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from broker_config.testing.inprocess import InProcessBroker
from sidestream.contract.messages import Telemetry, WeightsManifest
from sidestream.contract.wire import unpack
from tests.e2e.in_process import TOPICS, Kind, accuracies, agent, settings, table, told
from tests.trainer.test_trainer import Listener, trainer

KIND = Kind("opt", 4, 32)
EVERY_ONE = "publish_change = 0.0\npublish_share = 0.0\npublish_gain = 0.0\n"


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    torch.set_num_threads(1)
    with InProcessBroker(max_packet_bytes=2_000_000) as running:
        yield running


def used(listener: Listener, tier: str) -> set[int]:
    """Versions that a tier's device has told of."""
    topic = TOPICS.telemetry(tier, f"{tier}-1")
    words = [unpack(Telemetry, event.payload) for event in listener.seen if event.topic == topic]
    return {word.weights_version for word in words} - {0}


def test_every_version_or_the_first_and_the_finished_ones(broker: InProcessBroker, tmp_path: Path) -> None:
    tiers = table(tmp_path, "all", KIND) + table(tmp_path, "few", KIND)
    file = settings(tmp_path, tiers, passes=12, more=EVERY_ONE)
    with ExitStack() as stack:
        stack.enter_context(trainer(broker, file.load()))
        listener = Listener(broker.transport("watch"))
        stack.enter_context(agent(broker, tmp_path, "all", samples=64))
        stack.enter_context(agent(broker, tmp_path, "few", samples=64, weights="final"))
        accuracies(listener, {"all": 64, "few": 64})
        words = told(listener, "all"), told(listener, "few")
    assert all(words)
    every, few = (word for word in words if word is not None)
    assert few.final_only and not every.final_only and few.weights_version == every.weights_version
    assert 0 < few.weights_bytes_down < every.weights_bytes_down
    finished = [event for event in listener.seen if event.topic == TOPICS.final_weights("few")]
    versions = {unpack(WeightsManifest, event.payload).version for event in finished}
    assert used(listener, "few") <= versions, "and no version that only passed"
