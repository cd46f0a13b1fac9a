"""A passing version goes out when devices have paid for it, and would be better off with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from metrics.catalogue import TrainerMetrics
from side_trainer.broadcast.pace import Pace
from side_trainer.broadcast.publisher import ALL, Place, Publisher, Version
from side_trainer.broadcast.releases import Releases
from side_trainer.broadcast.retained import Retained
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.fold.fold import Fold
from side_trainer.fold.progress import Progress
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from sidestream.contract.messages import WeightsManifest
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack
from sidestream.host.trace import Trace
from tests.trainer.conftest import append, config, devices, fold_all, settle

TOPICS = Topics("colours")


class Stub:
    """A fold whose method says what it is told to say."""

    def __init__(self) -> None:
        self.gains: list[float | None] = []
        self.moved = 1.0
        self.samples = 100
        self.facts = SimpleNamespace(tiers={"big": None, "small": None})
        self.method = self

    def gain(self, before: Mapping[str, Any]) -> float | None:
        return self.gains.pop(0)

    def moved_by(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> float:
        return self.moved

    def bundles(self, run: str, version: int, codec: str) -> dict[str, bytes]:
        return {"big": bytes(300), "small": bytes(200)}


def pace(stub: Stub, **online: int) -> Pace:
    return Pace(cast(Fold, stub), lambda: online)


def test_nothing_goes_out_before_devices_have_sent_twice_its_bytes(tmp_path: Path) -> None:
    stub, settings = Stub(), config(tmp_path, publish_share=0.5, publish_gain=0.1)
    judged = pace(stub, big=2, small=3)
    judged.heard(2399)
    assert not judged.is_worth(settings, {}, {}), "and nothing was computed to find out"
    judged.heard(1)
    stub.gains = [0.2]
    assert judged.is_worth(settings, {}, {})
    judged.published()
    judged.heard(2399)
    assert not judged.is_worth(settings, {}, {}), "what was spent is spent"


def test_devices_must_be_better_off_and_it_is_not_asked_at_every_turn(tmp_path: Path) -> None:
    stub, settings = Stub(), config(tmp_path, publish_share=0.0, publish_gain=0.1)
    judged = pace(stub)
    stub.gains = [0.05, 0.09, 0.1]
    assert not judged.is_worth(settings, {}, {})
    assert not judged.is_worth(settings, {}, {}) and len(stub.gains) == 2
    stub.samples = 106
    assert not judged.is_worth(settings, {}, {})
    stub.samples = 120
    assert judged.is_worth(settings, {}, {})


def test_a_method_that_cannot_tell_goes_by_the_distance_alone(tmp_path: Path) -> None:
    stub, settings = Stub(), config(tmp_path, publish_share=0.0, publish_gain=0.1, publish_change=0.3)
    judged, weights = pace(stub), {"w": cast(Any, 0)}
    stub.moved, stub.gains = 0.2, [None]
    assert not judged.is_worth(settings, weights, weights) and stub.gains
    stub.moved = 0.4
    assert judged.is_worth(settings, weights, weights)


def test_the_loss_of_what_comes_next_tells_how_much_better_off_and_the_asking_changes_no_bit(
    journal: Journal, tmp_path: Path
) -> None:
    job, fleet = Job(config(tmp_path), journal), devices()
    settle(job, fleet)
    folds = Fold(journal), Fold(journal)
    gains = []
    for number in range(12):
        for device in fleet:
            append(journal, device, device.batch(job.plan))
        for fold in folds:
            fold_all(journal, fold)
        gains.append(folds[0].method.gain({}))
        if number == 3:
            early = folds[0].weights()
    assert folds[0].digest() == folds[1].digest()
    assert gains[0] is not None and gains[-1] is not None and gains[-1] > max(gains[0], 0.2)
    assert folds[0].method.gain(folds[0].weights()) == pytest.approx(0.0, abs=1e-6)
    since = folds[0].method.gain(early)
    assert since is not None and 0 < since < gains[-1]


class Link:
    """A broker's retained messages."""

    active, max_packet_bytes = True, 4096

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.sent: list[str] = []

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        self.sent.append(topic)
        if payload:
            self.retained[topic] = payload
        else:
            self.retained.pop(topic, None)

    def version_on(self, topic: str) -> int:
        return unpack(WeightsManifest, self.retained[topic]).version

    @property
    def chunks(self) -> set[int]:
        return {int(topic.split("/")[-2]) for topic in self.retained if topic.split("/")[-1].isdigit()}


def publisher(link: Link, journal: Journal) -> Publisher:
    metrics = TrainerMetrics(CollectorRegistry())
    metrics.set_tiers(["big"])
    return Publisher(link, journal, metrics, Retained(), TrainerSigner("colours"))  # type: ignore[arg-type]


def version(number: int, *, final: bool = False) -> Version:
    bundles = {"big": bytes([number]) * 9000}
    return Version(number=number, bundles=bundles, state_digest="d", samples=1, final=final)


def test_a_finished_version_stays_whole_while_others_pass(journal: Journal) -> None:
    link = Link()
    ours = publisher(link, journal)
    newest, finished = TOPICS.weights("big"), TOPICS.final_weights("big")
    assert ours.publish(version(1), "colours", places=ALL, keep=1)
    for number in (2, 3):
        assert ours.publish(version(number), "colours", places={Place.NEWEST}, keep=1)
        assert link.chunks == {1, number}
    assert (link.version_on(newest), link.version_on(finished)) == (3, 1)
    assert ours.publish(version(4, final=True), "colours", places=ALL, keep=4)
    assert link.chunks == {4} and link.version_on(newest) == link.version_on(finished) == 4
    assert ours.publish(version(5), "colours", places={Place.NEWEST}, keep=4)
    assert publisher(link, journal).publish(version(6), "colours"), "a trainer that was started again"
    assert link.chunks == {6} and link.version_on(finished) == 6


def test_a_broker_that_forgot_gets_both_again_and_devices_nothing_new(
    journal: Journal, tmp_path: Path
) -> None:
    settings = config(tmp_path, publish_every_s=0.0, publish_change=0.0)
    job, fleet, link, fold = Job(settings, journal), devices()[:1], Link(), Fold(journal)
    settle(job, fleet)
    progress = Progress(journal, fold, settings.learner)
    releases = Releases(
        *(settings, fold, progress, journal.run, publisher(link, journal)), online=dict, trace=Trace()
    )
    releases.again()
    for _ in range(3):
        append(journal, fleet[0], fleet[0].batch(job.plan))
        fold_all(journal, fold)
        releases.publish_if_due()
    newest, finished = TOPICS.weights("big"), TOPICS.final_weights("big")
    before = dict(link.retained)
    assert link.version_on(newest) == progress.version > link.version_on(finished)
    link.retained.clear()
    releases.config = config(tmp_path, publish_share=1e-9)
    append(journal, fleet[0], fleet[0].batch(job.plan))
    fold_all(journal, fold)
    releases._tried_at = 0.0
    releases.again()
    releases.publish_if_due()
    assert link.retained == before
