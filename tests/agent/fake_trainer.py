"""The other end of the wire, as a script: publishes a plan and weights, journals batches, sends receipts."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import msgspec

from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Event, Received
from sidestream.backbone.backbone import Backbone
from sidestream.contract.messages import (
    ActivationBatch,
    Flow,
    Receipt,
    Status,
    Telemetry,
    WeightsChunk,
    WeightsManifest,
    content_digest,
)
from sidestream.contract.plan import FlowPlan, Plan, SideNetworkSpec, TierPlan, tap_layers
from sidestream.contract.signing import Scope, Signer
from sidestream.contract.tasks import Task
from sidestream.contract.topics import Topics
from sidestream.contract.wire import Message, pack, unpack
from sidestream.side_network.bundle import About, digest, encode_bundle
from sidestream.side_network.network import SideNetwork
from tests.until import PATIENCE_S

RUN = "ab" * 16
JOB = "lights"
TIER = "generic"
LABELS = ("off", "on")
SPEC = SideNetworkSpec(blocks=2, width=8, inner=8)


def plan_for(backbone: Backbone, **changes: Any) -> Plan:
    """A plan whose one tier is settled on ``backbone``."""
    tier = TierPlan(
        backbone=backbone.name,
        batch_size=4,
        sampling="segments:2",
        depth=backbone.depth,
        width=backbone.width,
        taps=tap_layers(backbone.depth, SPEC.blocks),
        fingerprint=backbone.fingerprint,
    )
    plan = Plan(
        job=JOB,
        run=RUN,
        revision=1,
        task=Task.TEXT_CLASSIFICATION,
        labels=LABELS,
        tiers={TIER: tier},
        side_network=SPEC,
        flow=FlowPlan(window=4, retry_s=0.5),
    )
    return msgspec.structs.replace(plan, **changes)


def _told_more(trainer: FakeTrainer, *, device: str, than: int) -> bool:
    return trainer.telemetry[device].bytes_up > than


class FakeTrainer:
    """Journals whatever comes, once, and receipts it unless told not to."""

    def __init__(self, broker: InProcessBroker, backbone: Backbone) -> None:
        self.plan = plan_for(backbone)
        self.topics = Topics(JOB)
        self.receipts = True
        self.signer: Signer | None = None
        """Signs plan and manifests, if there is one."""
        self.received: list[tuple[str, ActivationBatch]] = []
        """Every batch that arrived, repeats included, with its device."""
        self.journal: dict[tuple[str, int], ActivationBatch] = {}
        """By stream and sequence."""
        self.statuses: list[tuple[str, Status]] = []
        self.telemetry: defaultdict[str, Telemetry] = defaultdict(lambda: Telemetry(stream="0" * 32))
        """The latest by device; blank before the first."""
        self._devices: dict[str, str] = {}
        self._changed = threading.Condition()
        self._transport = broker.transport("trainer", max_inflight=1000)
        self._todo: list[tuple[str, bytes]] = []
        self._closing = False
        self._thread = threading.Thread(target=self._answer, daemon=True)

    def __enter__(self) -> FakeTrainer:
        for kind in ("activations", "status", "telemetry"):
            self._transport.subscribe(self.topics.uplink_filter(kind))
        self._transport.start(self._on_event)
        self._thread.start()
        assert self._transport.wait_connected(20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._transport.close()

    # --- what it says ------------------------------------------------------------------------------------

    def send(self, topic: str, message: Message | bytes, *, retain: bool = True) -> None:
        payload = message if isinstance(message, bytes) else self.written(message)
        self._transport.publish(topic, payload, retain=retain)

    def written(self, message: Message) -> bytes:
        """A message as it travels."""
        if self.signer is not None and isinstance(message, Plan):
            return self.signer.sign(message, Scope(kind="plan", job=JOB))
        if self.signer is not None and isinstance(message, WeightsManifest):
            return self.signer.sign(message, Scope(kind="weights", job=JOB, tier=TIER))
        return pack(message)

    def publish_plan(self, **changes: Any) -> None:
        self.plan = msgspec.structs.replace(self.plan, **changes)
        self.send(self.topics.plan, self.plan)

    def publish_flow(self, *, window: int = 4, pause: bool = False) -> None:
        self.send(self.topics.flow(TIER), Flow(window=window, pause=pause))

    def publish_weights(
        self, version: int, *, final: bool = False, first: bool = False, chunks: int = 0, favour: int = 0
    ) -> bytes:
        """Publish a side-network that always answers with label ``favour``.

        The ``first`` good version and ``final`` ones stand where finished versions do, too.
        """
        bundle = self.bundle(version, favour=favour)
        parts = [
            bundle[index * len(bundle) // chunks : (index + 1) * len(bundle) // chunks]
            for index in range(chunks)
        ]
        for index, part in enumerate(parts):
            self.publish_chunk(version, index, part)
        manifest = self.manifest(version, bundle, final=final, chunks=chunks)
        self.send(self.topics.weights(TIER), manifest)
        if final or first:
            self.send(self.topics.final_weights(TIER), manifest)
        return bundle

    def publish_chunk(self, version: int, index: int, data: bytes) -> None:
        chunk = WeightsChunk(run=self.plan.run, version=version, index=index, data=data)
        self.send(self.topics.weights_chunk(TIER, version, index), chunk)

    def bundle(self, version: int, *, favour: int = 0, **about: Any) -> bytes:
        tier = self.plan.tiers[TIER]
        network = SideNetwork(self.plan.side_network, labels=len(self.plan.labels), seed=0)
        network.add_align(tier.align, tier.width)
        arrays = network.arrays()
        arrays["steps.0.head.bias"][favour] = 1.0
        described = About(
            job=JOB,
            run=self.plan.run,
            version=version,
            labels=self.plan.labels,
            side_network=self.plan.side_network,
            aligns={tier.align: tier.width},
            tiers={TIER: tier.align},
        )
        return encode_bundle(msgspec.structs.replace(described, **about), arrays)

    def manifest(self, version: int, bundle: bytes, **changes: Any) -> WeightsManifest:
        fields: dict[str, Any] = {
            "run": self.plan.run,
            "version": version,
            "state_digest": "0" * 64,
            "bundle_digest": digest(bundle),
            "bundle_bytes": len(bundle),
            "bundle": b"" if changes.get("chunks") else bundle,
        }
        return WeightsManifest(**{**fields, **changes})

    def receipt(self, device: str, stream: str, upto: int, **refusal: Any) -> None:
        batch = self.journal.get((stream, upto))
        receipt = Receipt(stream=stream, upto=upto, digest=content_digest(batch) if batch else "")
        self.send(self.topics.receipt(TIER, device), msgspec.structs.replace(receipt, **refusal))

    # --- what it hears -----------------------------------------------------------------------------------

    def wait(self, what: Callable[[FakeTrainer], object], timeout_s: float = PATIENCE_S) -> None:
        """Wait until ``what`` holds."""
        with self._changed:
            assert self._changed.wait_for(lambda: what(self), timeout_s), "waited in vain"

    def wait_for_telemetry(self, device: str, times: int = 2) -> None:
        """Wait until a device has reported so often: by the second time it has seen what was sent before."""
        for _ in range(times):
            before = self.telemetry[device].bytes_up
            self.wait(partial(_told_more, device=device, than=before))

    def rows(self) -> int:
        """Distinct samples journaled."""
        return sum(len(batch.sample_ids) for batch in self.journal.values())

    def watermark(self, stream: str) -> int:
        floors = [batch.floor for _, batch in self.received if batch.stream == stream]
        mark = max(floors, default=1) - 1
        while (stream, mark + 1) in self.journal:
            mark += 1
        return mark

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Received):
            with self._changed:
                self._todo.append((event.topic, event.payload))
                self._changed.notify_all()

    def _answer(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._todo or self._closing)
                if self._closing:
                    return
                topic, payload = self._todo.pop(0)
                owed = self._take(topic, payload)
                self._changed.notify_all()
            if owed is not None and self.receipts:
                self.receipt(*owed)

    def _take(self, topic: str, payload: bytes) -> tuple[str, str, int] | None:
        uplink = self.topics.parse_uplink(topic)
        if uplink.kind == "status":
            self.statuses.append((uplink.device, unpack(Status, payload)))
        elif uplink.kind == "telemetry":
            self.telemetry[uplink.device] = unpack(Telemetry, payload)
        else:
            batch = unpack(ActivationBatch, payload)
            self.received.append((uplink.device, batch))
            self.journal.setdefault((batch.stream, batch.sequence), batch)
            return uplink.device, batch.stream, self.watermark(batch.stream)
        return None


def sequences(batches: Sequence[tuple[str, ActivationBatch]]) -> list[int]:
    """Their sequence numbers."""
    return [batch.sequence for _, batch in batches]
