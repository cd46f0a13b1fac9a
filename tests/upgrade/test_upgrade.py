"""Agents and trainers of earlier versions, as they were recorded, against those of today."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch

from benchmarks.poison import kind_of
from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Event, Received, Transport, Will
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.session.agent import Agent
from side_trainer.operator.audit import verify
from side_trainer.operator.status import read_state
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.tier import TierConfig
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import load_backbone
from sidestream.contract.messages import ActivationBatch, Telemetry, WeightsManifest, content_digest
from sidestream.contract.plan import Plan, Precision
from sidestream.contract.tasks import Task
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack
from tests.agent.tiny import save_tiny
from tests.trainer.conftest import config
from tests.trainer.test_trainer import trainer
from tests.until import until

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("*.json"))
TIER = "small"


class Heard(NamedTuple):
    topic: str
    payload: bytes


def messages(recording: Path) -> list[Heard]:
    found = json.loads(recording.read_text())["messages"]
    return [Heard(one["topic"], base64.b64decode(one["payload"])) for one in found]


def last(heard: list[Heard], topic: str) -> bytes:
    return [one.payload for one in heard if one.topic == topic and one.payload][-1]


@pytest.fixture(params=RECORDINGS, ids=[path.stem for path in RECORDINGS])
def heard(request: pytest.FixtureRequest) -> list[Heard]:
    return messages(request.param)


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


def listen(broker: InProcessBroker, topic_filter: str) -> tuple[Transport, list[Received]]:
    seen: list[Received] = []

    def note(event: Event) -> None:
        if isinstance(event, Received):
            seen.append(event)

    transport = broker.transport("listener")
    transport.subscribe(topic_filter)
    transport.start(note)
    assert transport.wait_connected(20)
    return transport, seen


def test_there_is_a_recording() -> None:
    assert RECORDINGS


def test_every_recorded_message_is_read(heard: list[Heard]) -> None:
    kinds = {kind_of(one.topic) for one in heard if unpack(kind_of(one.topic), one.payload)}
    assert len(kinds) == 9


def settings_of(plan: Plan, folder: Path) -> TrainerConfig:
    """What the recorded trainer was configured with."""
    tier = plan.tiers[TIER]
    tiers = {TIER: TierConfig(backbone=tier.backbone, batch_size=tier.batch_size)}
    changes = {"job": plan.job, "labels": plan.labels, "tiers": tiers, "side_network": plan.side_network}
    return config(folder, **changes)


def test_agents_of_then_are_served_by_the_trainer_of_today(
    heard: list[Heard], broker: InProcessBroker, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    plan = next(unpack(Plan, one.payload) for one in heard if one.topic.endswith("/plan"))
    topics = Topics(plan.job)
    up = [one for one in heard if "/up/" in one.topic]
    batches = [unpack(ActivationBatch, one.payload) for one in up if one.topic.endswith("/activations")]
    newest = {batch.stream: max(b.sequence for b in batches if b.stream == batch.stream) for batch in batches}
    samples = len({(b.stream, sample) for b in batches for sample in b.sample_ids.tolist()})
    transport, seen = listen(broker, f"{topics.base}/#")
    with trainer(broker, settings_of(plan, tmp_path)):
        until(lambda: any(one.topic == topics.plan for one in list(seen)), "the trainer is there")
        for one in up:
            transport.publish(one.topic, one.payload, retain=one.topic.endswith("/status"))

        def receipted() -> dict[str, int]:
            found: dict[str, int] = {}
            for one in list(seen):
                if one.topic.endswith("/receipt"):
                    receipt = msgspec.msgpack.decode(one.payload)  # as an old agent does: by name
                    found[receipt["stream"]] = max(found.get(receipt["stream"], 0), receipt["upto"])
            return found

        until(lambda: receipted() == newest, "every batch is receipted")

        def learnt() -> bool:
            told = [one.payload for one in list(seen) if one.topic == topics.weights(TIER)]
            newest = unpack(WeightsManifest, told[-1]) if told else None
            return newest is not None and newest.final and newest.samples == samples

        until(learnt, "all is learnt")
        assert not [one for one in seen if "/rejected/" in one.topic]
    assert read_state(tmp_path).samples_unique == samples and verify(tmp_path).matches


def test_an_agent_of_today_takes_part_in_the_job_of_a_trainer_of_then(
    heard: list[Heard], broker: InProcessBroker, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    plan = unpack(Plan, last(heard, Topics(heard[0].topic.split("/")[2]).plan))
    topics = Topics(plan.job)
    backbone = load_backbone(str(save_tiny(tmp_path / "model", "bert")))
    backbone.fingerprint = plan.tiers[TIER].fingerprint  # random weights differ between versions of torch
    transport, seen = listen(broker, f"{topics.base}/up/#")
    for topic in (topics.flow(TIER), topics.weights(TIER), topics.trainer_status, topics.plan):
        transport.publish(topic, last(heard, topic), retain=True)
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"warm {n}", "label": plan.labels[0]}) + "\n" for n in range(12))
    )
    stop = threading.Event()

    def connect(config: AgentConfig, client_id: str, will: Will | None) -> Transport:
        return broker.transport(client_id, will=will)

    def load(reference: str, layers: int, precision: Precision, task: Task) -> Backbone:
        return backbone

    settings = AgentConfig(
        job=plan.job,
        device="new",
        tier=TIER,
        state_dir=str(tmp_path / "agent"),
        data=DataConfig(path=str(data), held_out_share=0.0),
        telemetry_every_s=0.1,
    )
    agent = Agent(settings, stop=stop, connect=connect, load_backbone=load)
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    try:
        receipt_of = msgspec.msgpack.decode(last(heard, topics.receipt(TIER, "dev-a")))

        def served() -> bool:
            """Receipt everything, in the words of then."""
            sent = [one for one in list(seen) if one.topic == topics.activations(TIER, "new")]
            if sent:
                batch = unpack(ActivationBatch, sent[-1].payload)
                word = {**receipt_of, "stream": batch.stream, "upto": batch.sequence}
                word["digest"] = content_digest(batch)
                transport.publish(topics.receipt(TIER, "new"), msgspec.msgpack.encode(word), retain=True)
            told = [one for one in list(seen) if one.topic == topics.telemetry(TIER, "new")]
            return bool(told) and unpack(Telemetry, told[-1].payload).finished

        until(served, "everything is sent and receipted")
        version = unpack(WeightsManifest, last(heard, topics.weights(TIER))).version
        until(
            lambda: any(
                unpack(Telemetry, one.payload).weights_version == version
                for one in list(seen)
                if one.topic == topics.telemetry(TIER, "new")
            ),
            "the recorded weights are adopted",
        )
    finally:
        stop.set()
        thread.join(20.0)
    assert not thread.is_alive()
