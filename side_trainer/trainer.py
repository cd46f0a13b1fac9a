"""The trainer process: opens, wires, runs and closes."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

from broker_config.connection.connection import Connection
from broker_config.transport import Transport, Will
from side_trainer.autotune.tuner import Tuner
from side_trainer.broadcast.announcements import Announcements
from side_trainer.broadcast.downlink import Downlink
from side_trainer.broadcast.leader_election import LeaderElection
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.presence import Presence, offline_status
from side_trainer.broadcast.publisher import Publisher
from side_trainer.broadcast.releases import Releases
from side_trainer.broadcast.replies import Replies
from side_trainer.broadcast.retained import Retained
from side_trainer.broadcast.signing import load_signer
from side_trainer.cells.torch_group import TorchGroup, store_of
from side_trainer.figures import Figures
from side_trainer.fold.checkpoint import newest_files
from side_trainer.fold.checkpointer import Checkpointer
from side_trainer.fold.fold import Fold
from side_trainer.fold.processors import set_threads
from side_trainer.fold.progress import Progress
from side_trainer.fold.retention import Retention
from side_trainer.ingest import Ingest
from side_trainer.job import Contradiction, Job, check
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.learner import Learner
from side_trainer.quarantine.judge import Judge
from side_trainer.queries.answering import Queries
from side_trainer.receive.batches import Batches
from side_trainer.receive.duties import Duties
from side_trainer.receive.inbox import SHARE_BYTES, Inbox
from side_trainer.receive.refusals import Refusals
from side_trainer.receive.reports import Reports
from side_trainer.receive.router import Router
from side_trainer.receive.setbacks import Setbacks
from side_trainer.receive.shut_out import ShutOut
from side_trainer.receive.subscriptions import Subscriptions
from side_trainer.settings.cells import rank_of
from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.state import state_dir_of
from side_trainer.threads import Threads
from side_trainer.together import Together
from sidestream.accelerator.torch_device import HERE, Placement, choose, deterministic
from sidestream.contract.errors import ConfigError, StateError
from sidestream.contract.plan import METHODS, Split
from sidestream.contract.tasks import TASKS, TargetForm
from sidestream.contract.topics import Topics
from sidestream.contract.wire import TARGET_MESSAGE_BYTES
from sidestream.host.state_dir import locked, prepare
from sidestream.host.trace import Trace, open_trace

_log = logging.getLogger(__name__)
_LEAST_STUCK_S: Final = 2.0  # a busy machine is no stuck broker

Connect = Callable[[TrainerConfig, str, Will], Transport]


def group_of(config: TrainerConfig, environ: Mapping[str, str]) -> TorchGroup | None:
    """The trainers of all cells; None where there are no cells.

    Raises:
        ConfigError: the environment does not say where the others are.
    """
    rank = rank_of(config.cells, environ)
    if rank is None:
        return None
    try:
        return TorchGroup(rank, len(config.cells), store_of(environ, config.job, rank))
    except (KeyError, ValueError) as exc:
        raise ConfigError(
            "cells", f"MASTER_ADDR and MASTER_PORT have to say where the first cell's trainer is: {exc}"
        ) from exc


def connect_mqtt(config: TrainerConfig, client_id: str, will: Will) -> Transport:
    """The real broker connection."""
    stuck_s = max(config.flow.retry_s, _LEAST_STUCK_S)
    return Connection(config.broker, client_id=client_id, will=will, max_inflight=64, stuck_s=stuck_s)


def run_trainer(
    config: TrainerConfig,
    stop: threading.Event,
    *,
    connect: Connect = connect_mqtt,
    started: Callable[[str, str], None] = lambda metrics_url, page_url: None,
    settings_file: SettingsFile | None = None,
    take_over: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run until ``stop`` is set.

    Args:
        config: The settings; of a cell, as :func:`~side_trainer.settings.state.in_cell` gives them.
        stop: Set by a signal handler.
        connect: Makes the transport; tests give the in-process one.
        started: Told once everything runs, with the URLs of metrics and page, empty if there are none.
        take_over: Depose another trainer of this job that is running.
        settings_file: Where ``config`` came from: followed, so that tiers can be added while it runs.
        clock: Seconds, by which it looks after devices, labels and tiers; tests move it.

    Raises:
        SidestreamError: if it cannot start: settings, state directory, port or broker.
    """
    config = config.checked()
    group = group_of(config, os.environ)
    set_threads(config.threads)
    with ExitStack() as stack:
        directory = prepare(state_dir_of(config))
        stack.enter_context(locked(directory, "a trainer"))
        journal = stack.enter_context(closing(_open_journal(directory, config)))
        trace = stack.enter_context(open_trace(config.trace_path))
        parts = Parts(config, journal, trace, connect, take_over, group)
        urls = parts.figures.serve(stack)
        inbox = Inbox(share_bytes=max(SHARE_BYTES, (1 + config.flow.window) * TARGET_MESSAGE_BYTES))
        learner = parts.learner(directory)
        ingest = parts.ingest(inbox, learner.wake, clock)
        threads = Threads(
            *(config, settings_file, parts.transport, parts.link, inbox, ingest, learner, parts.presence)
        )
        threads.run(stop, lambda: started(*urls))


def _placement(config: TrainerConfig) -> Placement:
    """Where is learnt, made ready for that.

    Raises:
        ConfigError: a GPU is asked for by name and cannot be had, or is of no use to the job.
    """
    on_processor = TASKS[config.task].generates or issubclass(METHODS[config.method], Split)
    if on_processor and config.compute_device.startswith("cuda"):
        what = config.task.value if TASKS[config.task].generates else config.method
        raise ConfigError("compute_device", f"{what} is learnt on the processor; write cpu or auto")
    found = HERE if on_processor else choose(config.compute_device)
    deterministic(found)
    _log.info("the side-network is learnt on %s", found.chosen)
    return found


def _open_journal(directory: Path, config: TrainerConfig) -> Journal:
    """The journal, or a new one where there never was one: checkpoints do not come without.

    A journal in which nothing is from a device, of a first start that failed, binds nobody to its settings.
    """
    path = directory / FILE_NAME
    if not path.exists() and newest_files(directory):
        raise StateError(
            f"{path} is missing, although there are checkpoints of it; restore the whole state directory "
            "from a backup, or begin anew with another --state-dir"
        )
    journal = Journal(path)
    try:
        check(config, journal)
    except Contradiction as exc:
        if not journal.unbegun:
            journal.close()
            raise
        _log.info("%s: no device has sent anything to it: it begins anew (%s)", path, exc)
        return _anew(journal)
    return journal


def _anew(journal: Journal) -> Journal:
    """Another journal in the place of one that is of no use, with a fence above its."""
    fence = journal.fence
    journal.close()
    for old in (*newest_files(journal.folder), *journal.folder.glob(f"{FILE_NAME}*")):
        old.unlink()
    fresh = Journal(journal.path)
    fresh.fence = fence
    return fresh


class Parts:
    """What ingest and learner share, in the order in which one needs the other; and those two.

    Args:
        config: The operator's settings.
        journal: Opened.
        trace: Told what is done when.
        connect: Makes the transport.
        take_over: Depose another trainer.
        group: The trainers of all cells, where there are several.
    """

    def __init__(
        self,
        config: TrainerConfig,
        journal: Journal,
        trace: Trace,
        connect: Connect,
        take_over: bool,
        group: TorchGroup | None = None,
    ) -> None:
        self._config, self._journal, self._trace = config, journal, trace
        self._topics = topics = Topics(config.job)
        self._signer = signer = load_signer(config.job, config.signing)
        journal.signers = signer.succeed(journal.signers)
        placement = _placement(config)
        self._job = Job(config, journal, placement.chosen.kind)
        # The clock is a hint only, for a journal and a broker that are both new to a job that is not.
        fence = max(journal.fence + 1, int(time.time()))
        election = LeaderElection(instance=secrets.token_hex(16), fence=fence, take_over=take_over)
        gone = offline_status(journal, election)
        will = Will(topic=topics.trainer_status, payload=signer.status(gone))
        self.transport = connect(config, f"sidestream-trainer-{secrets.token_hex(16)}", will)
        self.link = link = LeaderTransport(self.transport, election)
        self._judge = Judge(
            journal,
            suspects=config.quarantine,
            by_labels=TASKS[config.task].form is TargetForm.LABELS,
            held_max_bytes=config.quarantine_max_mib * 2**20,
        )
        cache_bytes = config.cache_mib * 2**20
        self._fold = Fold(journal, cache_bytes=cache_bytes, placement=placement, group=group)
        self._together = None
        if group is not None:
            names = [one.name for one in config.cells]
            self._together = Together(group, names, journal, self._fold, self._job.offer)
        self._progress = Progress(journal, self._fold, config.learner, awaited=lambda: self._replies.awaited)
        self.figures = Figures(config, journal, self._judge, link, self._job, self._progress)
        self._replies = Replies(
            *(journal, link, topics, signer, self.figures.metrics, trace),
            keep_s=config.reply_keep_h * 3600,
            patience_s=config.reply_patience_s,
        )
        self._queries = Queries(config.predict, link, topics, signer, self.figures.metrics, journal.run)
        self._retained = Retained()
        self._downlink = downlink = Downlink(link, topics, journal, self.figures.metrics)
        self.presence = Presence(election, journal, link, downlink, topics, signer, self._progress, gone)

    def learner(self, directory: Path) -> Learner:
        """The learner, which keeps checkpoints in ``directory``."""
        config, journal, fold, metrics = self._config, self._journal, self._fold, self.figures.metrics
        publisher = Publisher(self.link, journal, metrics, self._retained, self._signer)
        releases = Releases(
            *(config, fold, self._progress, journal.run, publisher),
            online=lambda: self.figures.online,
            trace=self._trace,
        )
        checkpointer = Checkpointer(directory, fold, journal, metrics)
        return Learner(
            *(config, journal, fold, self._progress, checkpointer, Retention(config, journal, fold)),
            *(releases, self._replies, self._queries),
            metrics=metrics,
            trace=self._trace,
            judge=self._judge.on_loss,
            together=self._together,
        )

    def ingest(self, inbox: Inbox, wake: Callable[[bool], None], clock: Callable[[], float]) -> Ingest:
        """What empties the inbox, subscribed to everything; ``wake`` wakes the learner."""
        journal, job, judge, topics = self._journal, self._job, self._judge, self._topics
        link, downlink, figures = self.link, self._downlink, self.figures
        announcements = Announcements(job, link, downlink, topics, self._retained, self._signer, wake)
        subscriptions, setbacks = Subscriptions(self.transport, topics), Setbacks(journal, self._signer)
        shut_out = ShutOut(inbox.box, subscriptions, topics, figures.fleet, figures.board, figures.metrics)
        rate = self._config.max_batches_per_s
        refusals = Refusals(downlink, topics, figures.board, figures.metrics, rate, inbox.box)
        tuner = self._tuner()
        reports = Reports(job, figures, downlink, setbacks, refusals, tuner)
        router = Router(
            *(topics, link, self.presence, announcements, setbacks, reports, refusals),
            *(figures.metrics, figures.broker, self._queries),
            plan=lambda: job.plan,
        )
        batches = Batches(
            *(journal, job, judge, downlink, refusals, setbacks, shut_out, figures.metrics, self._trace)
        )
        duties = Duties(
            *(inbox, journal, judge, downlink, announcements, self.presence, shut_out, figures), tuner=tuner
        )
        subscriptions.begin()
        return Ingest(*(inbox, router, reports, batches, link, announcements, duties), wake=wake, clock=clock)

    def _tuner(self) -> Tuner | None:
        """What chooses for single devices, where the settings have it."""
        if not self._config.autotune:
            return None
        return Tuner(
            *(self._config.tuning, self._journal, self._job, self.link, self._downlink),
            *(self._topics, self._signer, self.figures),
        )
