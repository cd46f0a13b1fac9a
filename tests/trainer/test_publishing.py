"""Weights get through whatever the broker takes, and what cannot get through costs next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from broker_config.errors import PublishTimeout
from broker_config.testing.inprocess import InProcessBroker
from metrics.catalogue import TrainerMetrics
from side_trainer.broadcast.publisher import Publisher, Version
from side_trainer.broadcast.retained import Retained
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from sidestream.contract.plan import SideNetworkSpec
from sidestream.host.now_and_then import NowAndThen
from sidestream.side_network.bundle import digest
from tests.trainer.conftest import append, config, devices, fold_all, settle
from tests.trainer.test_trainer import Listener, born, final, send, trainer
from tests.until import until


@pytest.mark.parametrize("limit", [131_072, 16_384, 2048])
def test_chunks_are_as_large_as_the_broker_takes(tmp_path: Path, limit: int) -> None:
    settings = config(tmp_path, side_network=SideNetworkSpec(width=128, inner=256), weights_codec="f32")
    with InProcessBroker(max_packet_bytes=limit) as broker, trainer(broker, settings):
        listener, fleet = Listener(broker.transport("watch")), devices()[:1]
        plan = born(listener, fleet)
        send(listener, fleet[0], fleet[0].batch(plan, rows=2))
        manifest = final(listener, 2)
        assert manifest.chunks > manifest.bundle_bytes // limit
        assert digest(listener.bundle(manifest)) == manifest.bundle_digest


def test_weights_that_cannot_go_out_are_warned_of_once(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Shut:
        active, max_packet_bytes, error = True, 4096, True

        def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
            if self.error:
                raise PublishTimeout("the broker is stuck")

    metrics, link = TrainerMetrics(CollectorRegistry()), Shut()
    metrics.set_tiers(["big"])
    publisher = Publisher(link, journal, metrics, Retained(), TrainerSigner("colours"))  # type: ignore[arg-type]
    job = Job(config(tmp_path), journal)
    fleet = devices()[:1]
    settle(job, fleet)
    append(journal, fleet[0], fleet[0].batch(job.plan))
    fold = fold_all(journal, Fold(journal))
    bundles = fold.method.bundles(journal.run, 1, "f32")
    version = Version(number=1, bundles=bundles, state_digest="d", samples=1, final=False)
    with caplog.at_level("INFO"):
        for _ in range(5):
            assert not publisher.publish(version, "colours")
        link.error = False
        assert publisher.publish(version, "colours")
    assert caplog.text.count("not fully published yet") == 1 and "version 1 is published" in caplog.text


def test_nothing_is_tried_while_there_is_no_broker_and_the_version_goes_out_once_there_is(
    broker: InProcessBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with trainer(broker, config(tmp_path)):
        listener, fleet = Listener(broker.transport("watch")), devices()[:1]
        plan = born(listener, fleet)
        send(listener, fleet[0], fleet[0].batch(plan))
        before = final(listener, 8)
        broker.stop(forget=True)
        listener.seen.clear()
        broker.start()
        until(lambda: listener.manifest() == before, "the same version is there again")
    assert "not fully published" not in caplog.text


def test_the_same_trouble_is_told_at_first_and_then_now_and_then() -> None:
    now = [0.0]
    warnings = NowAndThen(60.0, lambda: now[0])
    told = 0
    for _ in range(600):
        told += warnings.level() == 30
        now[0] += 1.0
    assert told == 10
    assert warnings.over() and not warnings.over()
    assert warnings.level() == 30
