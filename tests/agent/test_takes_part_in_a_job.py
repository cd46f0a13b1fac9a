from __future__ import annotations

import json
import logging
import time
import urllib.request
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

import edge_agent
from broker_config.testing.inprocess import InProcessBroker
from edge_agent.store.outbox import Outbox
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import BackboneError, BrokerError, ConfigError, DataError, StateError
from sidestream.contract.messages import ActivationBatch, TrainerStatus, content_digest
from sidestream.contract.plan import FlowPlan, labels_id
from sidestream.contract.sampling import Rung
from sidestream.contract.tensors import Codec, decode
from sidestream.contract.topics import plans_filter
from sidestream.contract.wire import TARGET_MESSAGE_BYTES, pack, unpack
from tests.agent.fake_trainer import JOB, LABELS, TIER, FakeTrainer
from tests.agent.fleet import Running, sentence, write_samples
from tests.until import Clock, until


def test_uploads_every_sample_once_and_ends_when_the_final_weights_are_measured(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 30)
    held = write_samples(tmp_path / "eval.jsonl", 11, start=100)
    trainer.publish_plan()
    settings = {"path": str(data), "evaluation_path": str(held)}
    with Running(broker, bert, tmp_path, data=settings, exit_when_done=True) as agent:
        trainer.wait(lambda t: t.rows() == 30)
        trainer.publish_weights(9, favour=1, final=True)
        assert agent.join() == 0
    told = trainer.telemetry["pi-1"]
    assert told.finished and told.weights_version == 9
    assert told.samples_forwarded == told.samples_read == 30
    assert told.accuracy == 5 / 11 and told.evaluation_samples == 11
    assert told.bytes_up > 0 and told.bytes_down > 0 and told.forward_seconds > 0 and told.peak_rss_bytes > 0


@pytest.mark.slow
def test_a_device_that_is_told_to_wait_says_so_keeps_its_batches_and_goes_on_when_there_is_room(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: TorchBackbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer.receipts = False
    trainer.publish_plan(flow=FlowPlan(window=4, retry_s=0.1))
    data = write_samples(tmp_path / "train.jsonl", 30)
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.received)
        stream = trainer.received[0][1].stream
        trainer.receipt("pi-1", stream, 0, wait=True, reason="pi-1 is quarantined")
        until(lambda: "no room for what this device sends: pi-1 is quarantined" in caplog.text, "it is said")
        trainer.receipts = True
        trainer.wait(lambda t: t.rows() == 30)
        trainer.wait(lambda t: t.telemetry["pi-1"].outbox_batches == 0)


@pytest.mark.slow
def test_batches_that_an_online_trainer_never_receipts_are_noticed_and_the_remedy_is_told(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: TorchBackbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer.receipts, clock = False, Clock()
    trainer.publish_plan()
    data = write_samples(tmp_path / "train.jsonl", 8)
    with Running(broker, bert, tmp_path, data={"path": str(data)}, clock=clock):
        trainer.wait(lambda t: t.rows() == 8)
        clock.forward(100.0)
        trainer.wait_for_telemetry("pi-1", 6)  # so long as no trainer is known to be there, nothing is wrong
        assert "no batch has been receipted" not in caplog.text
        status = TrainerStatus(state="online", run=trainer.plan.run, epoch=1)
        trainer.send(trainer.topics.trainer_status, status)
        until(lambda: "no batch has been receipted" in caplog.text, "it is said")
    assert "access list may not allow device 'pi-1' of tier 'generic' to write its activations" in caplog.text


def test_what_is_uploaded_is_what_the_plan_asks_for(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 10)
    trainer.publish_plan()
    before = {name: value.numpy().tobytes() for name, value in bert.parameters()}
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 10)
    batches = list(trainer.journal.values())
    samples = np.concatenate([batch.sample_ids for batch in batches])
    assert sorted(samples.tolist()) == list(range(10))
    for batch in batches:
        assert (
            batch.taps == (2, 4) and batch.sampling == "segments:2" and batch.labels_id == labels_id(LABELS)
        )
        assert batch.fingerprint == bert.fingerprint
        assert len(batch.sample_ids) <= 4 and set(batch.row_lengths.tolist()) <= {1, 2}
        assert np.isfinite(decode(batch.activations)).all()
    assert sum(int(batch.read_targets().sum()) for batch in batches) == 5
    assert {name: value.numpy().tobytes() for name, value in bert.parameters()} == before


def test_the_held_out_share_stays_on_the_device_and_measures(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 40)
    trainer.publish_plan()
    trainer.publish_weights(1, favour=0, final=True)
    settings = {"path": str(data), "held_out_share": 0.3}
    with Running(broker, bert, tmp_path, data=settings):
        trainer.wait(lambda t: t.telemetry["pi-1"].finished)
        trainer.publish_weights(2, favour=0, final=True)
        trainer.wait(
            lambda t: t.telemetry["pi-1"].accuracy is not None and t.telemetry["pi-1"].weights_version == 2
        )
    told = trainer.telemetry["pi-1"]
    assert 3 <= told.samples_held_out == told.evaluation_samples <= 25
    assert trainer.rows() == 40 - told.samples_held_out == told.samples_forwarded


def test_samples_are_consumed_once_across_restarts(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 12)
    trainer.publish_plan()
    for _ in range(2):
        with Running(broker, bert, tmp_path, data={"path": str(data)}):
            trainer.wait(lambda t: t.rows() == 12)
            trainer.wait(lambda t: t.telemetry["pi-1"].finished)
            trainer.telemetry.clear()
    write_samples(tmp_path / "train.jsonl", 15)
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 15)
    assert len({stream for stream, _ in trainer.journal}) == 1
    births = [status.birth for _, status in trainer.statuses]
    assert sorted(set(births)) == [1, 2, 3]


@pytest.mark.slow
def test_useless_samples_are_skipped_and_counted(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: TorchBackbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [("turn on", "on"), ("", "on"), ("  ", "off"), ("dim", "dim"), ("what", None), ("turn off", "off")]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.telemetry["pi-1"].finished)
    told = trainer.telemetry["pi-1"]
    assert (told.samples_read, told.samples_skipped, told.samples_forwarded) == (6, 3, 2)
    assert (told.skipped_empty, told.skipped_label, told.samples_unlabelled, told.unlabelled_waiting) == (
        2,
        1,
        1,
        1,
    )
    assert "label 'dim' is not one of the job's 2 labels" in caplog.text
    assert trainer.rows() == 2


@pytest.mark.slow
def test_rows_that_cannot_be_read_are_counted_once_over_restarts_and_told(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: TorchBackbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    data = tmp_path / "train.csv"
    good = "".join(f"turn on lamp {number},on\n" for number in range(6))
    data.write_bytes(b"text,label\n" + good.encode() + 6 * "wärmer bitte,on\n".encode("latin-1"))
    trainer.publish_plan()

    def done(births: int) -> bool:
        return trainer.telemetry["pi-1"].finished and len(trainer.statuses) >= births

    for births in (1, 2):
        with Running(broker, bert, tmp_path, data={"path": str(data), "held_out_share": 0}):
            until(partial(done, births), "all is read")
    told = trainer.telemetry["pi-1"]
    assert (told.samples_read, told.samples_forwarded, told.samples_broken, told.samples_skipped) == (
        12,
        6,
        6,
        0,
    )
    said = [one for one in caplog.records if "samples read" in one.message and one.levelname == "WARNING"]
    assert said[0].message.startswith("12 samples read: 6 forwarded, 0 held out, 6 unreadable;")


def test_a_watched_folder_is_worked_off_as_it_fills(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    folder = tmp_path / "inbox"
    folder.mkdir()
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(folder), "watch": True}):
        write_samples(folder / "a.jsonl", 5)
        trainer.wait(lambda t: t.rows() == 5)
        with (folder / "a.jsonl").open("a") as file:
            file.write(json.dumps({"text": "turn it on now", "label": "on"}) + "\n")
        trainer.wait(lambda t: t.rows() == 6)
        write_samples(folder / "b.jsonl", 4, start=50)
        trainer.wait(lambda t: t.rows() == 10)
    assert not trainer.telemetry["pi-1"].finished


def test_batches_over_the_target_size_are_split(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 16)
    tier = msgspec.structs.replace(trainer.plan.tiers[TIER], batch_size=16, sampling="all")
    trainer.publish_plan(tiers={TIER: tier})
    broker.max_packet_bytes = 4096
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 16)
    assert len(trainer.journal) > 1
    assert all(len(pack(batch)) < 4096 < TARGET_MESSAGE_BYTES for batch in trainer.journal.values())
    assert trainer.telemetry["pi-1"].samples_forwarded == 16


def test_a_backbone_gone_wrong_uploads_nothing(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    broken = TorchBackbone.load(bert.name)
    name, weight = next((n, p) for n, p in broken.parameters() if n.endswith("word_embeddings.weight"))
    weight[4] = float("nan")  # the word "turn", in every sample
    data = write_samples(tmp_path / "train.jsonl", 6)
    trainer.publish_plan()
    with Running(broker, broken, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.telemetry["pi-1"].finished)
    told = trainer.telemetry["pi-1"]
    assert trainer.rows() == told.samples_forwarded == 0, name
    assert told.samples_read == told.samples_skipped == told.skipped_activations == 6, name


def test_forward_passes_go_on_while_nothing_can_be_sent(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 40)
    trainer.publish_plan()
    trainer.publish_flow(pause=True)
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.telemetry["pi-1"].outbox_batches == 10)
        assert trainer.rows() == 0
        trainer.publish_flow(window=2)
        trainer.wait(lambda t: t.rows() == 40)


@pytest.mark.slow
def test_lost_and_repeated_messages_change_nothing(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 60)
    trainer.publish_plan()
    broker.lose_next(3, trainer.topics.uplink_filter("activations"))
    broker.lose_next(2, trainer.topics.receipt(TIER, "pi-1"))
    broker.duplicate_next(4, trainer.topics.uplink_filter("activations"))
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        broker.drop(agent.client_id)
        trainer.wait(lambda t: t.rows() == 60)
        broker.stop()
        broker.start()
        trainer.wait(lambda t: t.telemetry["pi-1"].finished)
    assert trainer.rows() == 60 and trainer.telemetry["pi-1"].samples_forwarded == 60


def test_receipts_for_other_streams_are_ignored(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 8)
    trainer.receipts = False
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 8)
        trainer.receipt("pi-1", "0" * 32, 2)
        trainer.wait_for_telemetry("pi-1", 3)
        assert trainer.telemetry["pi-1"].outbox_batches == 2
        trainer.receipt("pi-1", trainer.received[0][1].stream, 2)
        trainer.wait(lambda t: t.telemetry["pi-1"].finished)


def test_what_a_trainer_says_that_another_one_has_taken_over_from_is_ignored(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 8)
    trainer.receipts = False
    trainer.publish_plan(fence=5)
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 8)
        first = trainer.received[0][1]
        refused = {"refused_sequence": 1, "refused_digest": content_digest(first), "reason": "wrong taps"}
        for said in ({}, refused, {"wait": True}):
            trainer.receipt("pi-1", first.stream, 2, fence=4, **said)
        trainer.receipt("pi-1", first.stream, 3, fence=4, digest="f" * 32)  # of another history
        trainer.wait_for_telemetry("pi-1", 3)
        told = trainer.telemetry["pi-1"]
        assert (told.outbox_batches, told.batches_refused, told.streams_forked) == (2, 0, 0)
        trainer.receipt("pi-1", first.stream, 2, fence=5)
        trainer.wait(lambda t: t.telemetry["pi-1"].finished)


def test_a_refusal_is_believed_only_if_it_names_the_batch_by_its_content(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: TorchBackbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 8)
    trainer.receipts = False
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 8)
        first = trainer.received[0][1]
        refusal = {"refused_sequence": first.sequence, "reason": "wrong taps"}
        trainer.receipt("pi-1", first.stream, 0, refused_digest="0" * 32, **refusal)
        trainer.wait_for_telemetry("pi-1", 3)
        assert trainer.telemetry["pi-1"].batches_refused == 0
        trainer.receipt("pi-1", first.stream, 0, refused_digest=content_digest(first), **refusal)
        trainer.wait(lambda t: t.telemetry["pi-1"].batches_refused == 1)
        trainer.wait(lambda t: t.received[-1][1].floor == 2)
    assert "refused batch 1: wrong taps" in caplog.text
    assert trainer.telemetry["pi-1"].outbox_batches == 1


def test_births_deaths_and_wills_are_told(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 4)
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.statuses and t.statuses[-1][1].fingerprint)
        online = trainer.statuses[-1][1]
        assert (online.state, online.depth, online.width) == ("online", 4, 32)
        assert online.labels == () and online.fingerprint == bert.fingerprint  # the job has its labels
        broker.drop(agent.client_id)
        trainer.wait(lambda t: any(s.state == "offline" and s.reason == "lost" for _, s in t.statuses))
        trainer.wait(lambda t: t.statuses[-1][1].state == "online")
    trainer.wait(lambda t: t.statuses[-1][1].state == "offline")
    last = trainer.statuses[-1][1]
    assert last.reason == "goodbye" and last.birth == online.birth


def test_a_device_without_data_gets_the_weights_and_stays(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    trainer.publish_weights(3)
    with Running(broker, bert, tmp_path):
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == 3)
        trainer.publish_weights(4)
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == 4)


@pytest.mark.slow
def test_a_job_of_which_there_is_no_plan_is_told_with_those_there_are(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: TorchBackbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    elsewhere = broker.transport("elsewhere")
    elsewhere.start(lambda event: None)
    assert elsewhere.wait_connected(20)
    plan = msgspec.structs.replace(trainer.plan, job="heating")
    elsewhere.publish(plans_filter().replace("+", "heating"), pack(plan), retain=True)
    with Running(broker, bert, tmp_path):
        until(lambda: f"there is no plan of job {JOB!r}" in caplog.text, "it has looked")
    assert "it has those of: heating" in caplog.text


def test_the_agent_waits_until_labels_and_tier_are_settled(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 4)
    settled = trainer.plan
    bare = msgspec.structs.replace(settled.tiers[TIER], depth=0, width=0, taps=(), fingerprint="")
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.publish_plan(labels=(), tiers={TIER: bare})
        trainer.wait(lambda t: t.statuses and t.statuses[-1][1].fingerprint)
        trainer.publish_plan(revision=2, labels=(), tiers=settled.tiers)
        trainer.wait_for_telemetry("pi-1", 3)
        assert trainer.rows() == 0
        trainer.publish_plan(revision=3, labels=LABELS)
        trainer.wait(lambda t: t.rows() == 4)


@pytest.mark.slow
def test_a_new_journal_of_the_trainer_gets_everything_again(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 6)
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 6)
        first = {stream for stream, _ in trainer.journal}
        trainer.journal.clear()
        trainer.publish_plan(run="cd" * 16)
        trainer.wait(lambda t: t.rows() == 6)
    assert not first & {stream for stream, _ in trainer.journal}


def test_a_tier_that_joins_the_job_does_not_disturb_the_agents_of_the_others(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    """Neither one that is waiting for its tier to be settled, nor one that is at work."""
    settled = trainer.plan.tiers
    bare = msgspec.structs.replace(settled[TIER], depth=0, width=0, taps=(), fingerprint="")
    more = msgspec.structs.replace(bare, backbone="another", align="another")
    trainer.publish_plan(tiers={TIER: bare})
    data = {"path": str(write_samples(tmp_path / "data.jsonl", 12)), "watch": True}
    with Running(broker, bert, tmp_path, data=data):
        trainer.wait(lambda t: any(status.fingerprint for _, status in t.statuses))
        births = {status.birth for _, status in trainer.statuses}
        trainer.publish_plan(revision=2, tiers={TIER: bare, "more": more})
        trainer.publish_plan(revision=3, tiers={**settled, "more": more})
        trainer.wait(lambda t: t.rows() == 12)
        trainer.publish_plan(revision=4, tiers={**settled, "more": more, "most": more})
        write_samples(tmp_path / "data.jsonl", 20)
        trainer.wait(lambda t: t.rows() == 20)
    assert {status.birth for _, status in trainer.statuses if status.state == "online"} == births
    arrived = [batch.sequence for _, batch in trainer.received]
    assert arrived == sorted(set(arrived))


def test_a_plan_with_other_labels_starts_the_agent_over(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    with Running(broker, bert, tmp_path):
        trainer.wait(lambda t: t.statuses and t.statuses[-1][1].fingerprint)
        trainer.publish_plan(revision=2, labels=("off", "on", "dim"))
        trainer.wait(lambda t: t.statuses[-1][1].birth == 2 and t.statuses[-1][1].state == "online")


def test_nonsense_on_the_devices_topics_is_logged_and_survived(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: TorchBackbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 4)
    topics = trainer.topics
    places = (topics.plan, topics.flow(TIER), topics.receipt(TIER, "pi-1"), topics.weights(TIER))
    for topic in places:
        trainer.send(topic, b"\xc1 garbage", retain=False)
        trainer.send(topic, b"\x81\xa1v\x01")
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.statuses)
        for topic in places:
            trainer.send(topic, bytes(range(256)), retain=False)
        trainer.publish_plan()
        trainer.wait(lambda t: t.rows() == 4)
    assert all(f"a message on {topic} cannot be used" in caplog.text for topic in places)


# --- what the user has to mend ---------------------------------------------------------------------------


def test_another_model_is_refused_with_a_clear_message(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    tier = msgspec.structs.replace(trainer.plan.tiers[TIER], fingerprint="def0" * 8)
    trainer.publish_plan(tiers={TIER: tier})
    with (
        Running(broker, bert, tmp_path) as agent,
        pytest.raises(
            BackboneError,
            match=r"backbone weights \(.{8}….*are not the job's \(def0def0…\): install the same",
        ),
    ):
        agent.join()
    trainer.wait(lambda t: t.statuses[-1][1].state == "offline")
    assert "install the same" in trainer.statuses[-1][1].reason


def test_a_tier_that_the_plan_does_not_know_is_told_with_those_it_does(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: TorchBackbone,
    tmp_path: Path,
) -> None:
    clock = Clock()
    trainer.publish_plan(tiers={"pi5": trainer.plan.tiers[TIER]})
    with (
        Running(broker, bert, tmp_path, clock=clock) as agent,
        pytest.raises(ConfigError, match="tier: 'generic' is no tier of the job; its plan has: pi5"),
    ):
        clock.until(lambda: agent.error is not None, "it gives up")
        agent.join()


def test_an_unreachable_broker_ends_the_agent_after_a_while(
    broker: InProcessBroker, bert: TorchBackbone, tmp_path: Path
) -> None:
    broker.stop()
    with (
        Running(broker, bert, tmp_path, broker_wait_s=0.3) as agent,
        pytest.raises(BrokerError, match="cannot be reached"),
    ):
        agent.join()


def test_a_second_agent_on_a_state_directory_is_refused(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    with Running(broker, bert, tmp_path):
        trainer.wait(lambda t: t.statuses)
        with Running(broker, bert, tmp_path) as second, pytest.raises(StateError, match="in use"):
            second.join()


def test_data_that_cannot_be_read_ends_the_agent_before_it_connects(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    settings = {"path": str(tmp_path / "no.csv")}
    with Running(broker, bert, tmp_path, data=settings) as agent, pytest.raises(DataError, match="no file"):
        agent.join()
    assert trainer.statuses == []


def test_a_receipt_for_batches_never_made_is_told_and_a_new_stream_begins(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: TorchBackbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 4)
    trainer.publish_plan()
    trainer.receipts = False
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 4 and t.telemetry["pi-1"].outbox_batches > 0)
        stream = trainer.received[0][1].stream
        trainer.receipt("pi-1", stream, 99)
        trainer.wait(lambda _: "history of this outbox" in caplog.text)
        trainer.wait(lambda t: {batch.stream for _, batch in t.received} > {stream})
        trainer.receipts = True
        trainer.receipt("pi-1", stream, 99)  # what stands there still begins no third one
        trainer.wait(lambda t: t.telemetry["pi-1"].outbox_batches == 0)
    assert len({batch.stream for _, batch in trainer.received}) == 2
    assert trainer.telemetry["pi-1"].streams_forked == 1


# --- several in one process ------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_agents_share_a_process_and_a_backbone_and_nothing_else(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    names = [f"pi-{number}" for number in range(4)]
    files = [write_samples(tmp_path / f"{name}.jsonl", 10, start=100 * n) for n, name in enumerate(names)]
    agents = [
        Running(broker, bert, tmp_path, device=name, data={"path": str(file)}, exit_when_done=True)
        for name, file in zip(names, files, strict=True)
    ]
    for agent in agents:
        agent.__enter__()
    trainer.wait(lambda t: t.rows() == 40)
    trainer.publish_weights(5, final=True)
    assert [agent.join() for agent in agents] == [0, 0, 0, 0]
    assert len({stream for stream, _ in trainer.journal}) == 4
    for name in names:
        folder = tmp_path / f"state-{name}"
        with Outbox(folder, job=JOB, device=name, tier=TIER, max_bytes=1) as outbox:
            assert outbox.counters()["samples_forwarded"] == 10 and outbox.size() == (0, 0)


@pytest.mark.slow
def test_a_full_outbox_pauses_the_producer_and_loses_nothing(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": sentence(n) + " the" * 40, "label": "on"}) for n in range(400)]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(lines))
    tier = msgspec.structs.replace(trainer.plan.tiers[TIER], batch_size=32, sampling="all", codec=Codec.F32)
    trainer.publish_plan(tiers={TIER: tier}, flow=FlowPlan(window=8, retry_s=60))
    trainer.publish_flow(pause=True)
    with Running(broker, bert, tmp_path, data={"path": str(data)}, outbox_max_mib=1):
        trainer.wait(lambda t: t.telemetry["pi-1"].outbox_bytes > 2**20)
        trainer.wait_for_telemetry("pi-1", 5)
        assert trainer.telemetry["pi-1"].samples_forwarded < 400
        trainer.publish_flow()
        trainer.wait(lambda t: t.rows() == 400)


def test_an_agent_serves_its_own_metrics_where_it_is_asked_to(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 8)
    trainer.publish_plan()
    trainer.publish_weights(3, final=True)
    with Running(broker, bert, tmp_path, data={"path": str(data)}, metrics_port=0) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].finished)
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == 3)
        with urllib.request.urlopen(agent.started[0], timeout=5) as answer:
            shown = answer.read().decode()
    assert "sidestream_agent_samples_forwarded_total 8.0" in shown
    assert (
        "sidestream_agent_weights_version 3.0" in shown and "sidestream_agent_broker_connected 1.0" in shown
    )
    assert "sidestream_agent_receipt_seconds_count 2.0" in shown


def test_ctrl_c_takes_leave_in_order(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: TorchBackbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 200)
    trainer.publish_plan()
    with caplog.at_level(logging.WARNING), Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.rows() >= 4)
        agent.stop.set()
        assert agent.join() == 0
    trainer.wait(lambda t: t.statuses[-1][1].reason == "goodbye")
    assert not caplog.records


@pytest.mark.slow
def test_a_device_with_a_byte_budget_goes_by_the_ladder_and_measures_by_the_tiers_own_policy(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 200)
    held = write_samples(tmp_path / "eval.jsonl", 11, start=500)
    ladder = (
        Rung(sampling="all", codec=Codec.INT8),
        Rung(sampling="important:2", codec=Codec.INT8),
        Rung(sampling="mean", codec=Codec.INT2),
    )
    tier = msgspec.structs.replace(trainer.plan.tiers[TIER], ladder=ladder, batch_size=8)
    trainer.publish_plan(tiers={TIER: tier})
    budget = 250
    settings = {"path": str(data), "evaluation_path": str(held)}
    with Running(
        broker, bert, tmp_path, data=settings, bytes_per_sample=budget, exit_when_done=True
    ) as agent:
        trainer.wait(lambda t: t.rows() == 200)
        trainer.publish_weights(9, favour=1, final=True)
        assert agent.join() == 0
    batches = list(trainer.journal.values())
    assert {(b.sampling, b.activations.codec) for b in batches} <= {(r.sampling, r.codec) for r in ladder}
    assert len({b.sampling for b in batches}) > 1
    assert 0.9 * budget <= sum(len(pack(batch)) for batch in batches) / 200 <= budget
    assert trainer.telemetry["pi-1"].accuracy == 5 / 11


@pytest.mark.slow
def test_a_device_with_a_link_budget_sends_no_faster(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 400)
    trainer.publish_plan()
    started = time.monotonic()
    with Running(broker, bert, tmp_path, data={"path": str(data)}, max_kib_per_minute=60 * 2.0) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].samples_forwarded == 400 and t.received)
        sent, took_s = list(trainer.received), time.monotonic() - started
    sizes = [len(pack(batch)) for _, batch in sent]
    assert 0 < sum(sizes) <= 2 * 1024 * took_s + max(sizes)
    with Outbox(Path(agent.config.state_dir), job=JOB, device="pi-1", tier=TIER, max_bytes=1) as outbox:
        waiting = [unpack(ActivationBatch, one.payload).sampling for one in outbox.streams.waiting(0, 1000)]
    assert sent[0][1].sampling == "all" and waiting[-1] == "mean", "the rung went down as the outbox filled"


def test_the_backbone_is_kept_as_the_plan_says(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 6)
    tier = msgspec.structs.replace(trainer.plan.tiers[TIER], precision="int8")
    trainer.publish_plan(tiers={TIER: tier})
    trainer.publish_weights(3, favour=1, final=True)
    with Running(broker, bert, tmp_path, data={"path": str(data)}) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == 3 and t.rows() == 6)
        assert agent.asked == [(bert.name, 0, "int8")]
    assert edge_agent.load(agent.config.state_path).predict(["turn it on"])[0].label == LABELS[1]
