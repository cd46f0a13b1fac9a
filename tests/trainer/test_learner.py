"""The learner publishes again whatever comes up while it publishes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from metrics.catalogue import TrainerMetrics
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.publisher import Publisher, Version
from side_trainer.broadcast.releases import Releases
from side_trainer.broadcast.replies import Replies
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.fold.checkpointer import Checkpointer
from side_trainer.fold.fold import Fold
from side_trainer.fold.progress import Progress
from side_trainer.fold.retention import Retention
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.learner import Learner
from side_trainer.queries.answering import Queries
from side_trainer.settings.split import PredictConfig
from sidestream.contract.topics import Topics
from sidestream.host.trace import Trace
from tests.trainer.conftest import append, config, devices, settle
from tests.until import until


def no_queries(journal: Journal, metrics: TrainerMetrics) -> Queries:
    """Of a job whose devices ask nothing."""
    link, signer = cast(LeaderTransport, None), TrainerSigner("colours")
    return Queries(PredictConfig(), link, Topics("colours"), signer, metrics, journal.run)


class Slow:
    """A publisher during whose first work a new connection comes up; it then fails once, too."""

    def __init__(self) -> None:
        self.sizes: Mapping[str, int] = {}
        self.learner: Learner | None = None
        self.published: list[Version] = []

    def publish(self, version: Version, job: str, *, places: object, keep: int) -> bool:
        self.published.append(version)
        assert self.learner is not None
        if len(self.published) == 1:
            self.learner.wake(True)
        return len(self.published) != 2


def no_replies(journal: Journal, metrics: TrainerMetrics) -> Replies:
    """Of a method that answers nothing."""
    link, signer = cast(LeaderTransport, None), TrainerSigner("colours")
    return Replies(journal, link, Topics("colours"), signer, metrics, Trace(), keep_s=1.0, patience_s=1.0)


@pytest.mark.slow
def test_a_connection_that_comes_up_while_publishing_gets_the_weights_too(
    journal: Journal, tmp_path: Path
) -> None:
    settings = config(tmp_path, idle_after_s=60.0)
    job, fleet, slow = Job(settings, journal), devices(), Slow()
    settle(job, fleet)
    append(journal, fleet[0], fleet[0].batch(job.plan))
    metrics = TrainerMetrics(CollectorRegistry())
    metrics.set_tiers(settings.tiers)
    fold, trace, publisher = Fold(journal), Trace(), cast(Publisher, slow)
    progress = Progress(journal, fold, settings.learner)
    checkpointer = Checkpointer(tmp_path, fold, journal, metrics)
    releases = Releases(settings, fold, progress, journal.run, publisher, online=dict, trace=trace)
    slow.learner = Learner(
        *(settings, journal, fold, progress, checkpointer, Retention(settings, journal, fold), releases),
        *(no_replies(journal, metrics), no_queries(journal, metrics)),
        metrics=metrics,
        trace=trace,
    )
    stop = threading.Event()
    thread = threading.Thread(target=slow.learner.run, args=(stop,))
    thread.start()
    try:
        until(lambda: len(slow.published) == 3, "published, asked for again, failed, tried again")
    finally:
        stop.set()
        thread.join()
    assert len({version.number for version in slow.published}) == 1
    assert slow.published[1] is slow.published[2], "what could not go out was made once"


def test_the_loss_that_is_shown_moves_while_nothing_arrives_and_the_log_has_the_same(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("side_trainer.learner._PROGRESS_EVERY_S", -1.0)
    settings = config(tmp_path, idle_after_s=0.0)
    job, fleet = Job(settings, journal), devices()
    settle(job, fleet)
    metrics, judged = TrainerMetrics(CollectorRegistry()), list[float]()
    metrics.set_tiers(settings.tiers)
    fold, trace = Fold(journal), Trace()
    progress = Progress(journal, fold, settings.learner)
    learner = Learner(
        *(settings, journal, fold, progress, Checkpointer(tmp_path, fold, journal, metrics)),
        Retention(settings, journal, fold),
        Releases(settings, fold, progress, journal.run, cast(Publisher, Slow()), online=dict, trace=trace),
        *(no_replies(journal, metrics), no_queries(journal, metrics)),
        metrics=metrics,
        trace=trace,
        judge=lambda tier, stream, loss: judged.append(loss),
    )
    append(journal, fleet[0], fleet[0].batch(job.plan))
    while learner._catch_up(threading.Event()) or learner._own():
        pass
    arrived = metrics.loss[fleet[0].tier]
    assert len(judged) == 1
    assert learner._idle()
    assert metrics.loss[fleet[0].tier] < arrived and len(judged) == 1
    assert f"{fleet[0].tier} {metrics.loss[fleet[0].tier]:.3f}" in caplog.messages[-1]
