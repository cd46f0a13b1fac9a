"""A flood of garbage on an activation topic: refused, then not heard; training and memory undisturbed."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker_config.connection.connection import Connection
from broker_config.embedded.broker import EmbeddedBroker
from broker_config.settings import BrokerSettings
from broker_config.transport import Event, Received
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec, Tensor, encode
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack, unpack
from tests.e2e.processes import Processes
from tests.until import until

COUNT = 1000


@pytest.fixture(params=[Task.TEXT_CLASSIFICATION, Task.CAUSAL_LM], ids=lambda task: task.value)
def fleet(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Processes]:
    with EmbeddedBroker(data_dir=tmp_path / "broker") as broker:
        processes = Processes(tmp_path, broker.url, task=request.param)
        yield processes
        processes.close()


def garbage(real: bytes, rng: np.random.Generator) -> bytes:
    """One of: random bytes, a truncated real message, a wrong shape, NaN, a flood of nesting, too much."""
    batch = unpack(ActivationBatch, real)
    kind = rng.integers(6)
    if kind == 0:
        return rng.bytes(int(rng.integers(1, 4000)))
    if kind == 1:
        return real[: int(rng.integers(1, len(real)))]
    if kind == 2:
        taps, _, width = batch.activations.shape
        wrong = encode(rng.standard_normal((taps, int(batch.row_lengths.sum()), width + 1)), Codec.INT8)
        return pack(msgspec.structs.replace(batch, activations=wrong))
    if kind == 3:
        values = np.full(batch.activations.shape, np.nan, "<f4")
        nan = Tensor(codec=Codec.F32, shape=batch.activations.shape, data=values.tobytes())
        return pack(msgspec.structs.replace(batch, activations=nan))
    if kind == 4:
        return b"\x91" * int(rng.integers(1, 200_000))
    return rng.bytes(270_000)


def figure(fleet: Processes, name: str) -> float:
    url = next(
        line.split()[1].rstrip(";")
        for line in (fleet.folder / "trainer.log").read_text().splitlines()
        if line.startswith("metrics: ")
    )
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return sum(s.value for family in families for s in family.samples if s.name == name)


def test_a_thousand_garbage_messages_are_refused_and_training_goes_on(fleet: Processes) -> None:
    trainer = fleet.trainer()
    seen: list[Received] = []

    def note(event: Event) -> None:
        if isinstance(event, Received):
            seen.append(event)

    attacker = Connection(BrokerSettings(url=fleet.url), client_id="attacker")
    attacker.subscribe(Topics(fleet.job).uplink_filter("activations"))
    attacker.start(note)
    agent = fleet.agent("dev-a", 80)
    until(lambda: seen, "a real message to copy")
    rng, topic = np.random.default_rng(3), Topics(fleet.job).activations("small", "vandal")
    refused = "sidestream_messages_rejected_total"

    def flood(count: int) -> None:
        before = figure(fleet, refused)
        for _ in range(count):
            attacker.publish(topic, garbage(seen[0].payload, rng), qos=1)
        until(lambda: figure(fleet, refused) > before or shut_out(), "some are counted, or none is heard")

    def shut_out() -> bool:
        return figure(fleet, "sidestream_topics_shut_out") == 1

    flood(COUNT // 2)
    after_half = figure(fleet, "process_resident_memory_bytes")
    flood(COUNT // 2)
    grown = figure(fleet, "process_resident_memory_bytes") - after_half
    assert grown < 20 * 2**20, f"the trainer grew by {grown / 2**20:.0f} MiB"
    attacker.close()
    fleet.expect_exit(agent, "dev-a")
    assert 0 < figure(fleet, refused) <= COUNT
    assert figure(fleet, "sidestream_penalties_total") > 0
    fleet.stop(trainer, "trainer")
    assert fleet.trained() == 80
    assert "the digest matches" in fleet.run("trainer", "verify", "--state-dir", str(fleet.trainer_state))
