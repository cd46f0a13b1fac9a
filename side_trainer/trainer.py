"""The trainer process: wires inbox, ingest, journal, learner and publisher together, and closes in order."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch
from prometheus_client import CollectorRegistry

from broker_config.connection.connection import Connection
from broker_config.transport import Transport, Will
from metrics.broker_figures import BrokerFigures
from metrics.catalogue import TrainerMetrics
from metrics.fleet_page.board import Board
from metrics.fleet_page.device_series import DeviceSeries
from metrics.fleet_page.fleet import Fleet
from metrics.fleet_page.server import PortInUseError, serve_page
from metrics.server import serve
from side_trainer.broadcast.leader_election import LeaderElection
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.publisher import Publisher
from side_trainer.broadcast.retained import Retained
from side_trainer.broadcast.signing import load_signer
from side_trainer.fold.checkpoint import newest_files
from side_trainer.ingest import Ingest
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.learner import Learner
from side_trainer.quarantine.judge import Judge
from side_trainer.receive.inbox import SHARE_BYTES, Inbox
from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import BrokerError, StateError
from sidestream.contract.messages import TrainerStatus
from sidestream.contract.tasks import TASKS, TargetForm
from sidestream.contract.topics import Topics
from sidestream.contract.wire import TARGET_MESSAGE_BYTES
from sidestream.host.state_dir import default_dir, locked, prepare
from sidestream.host.trace import open_trace

_log = logging.getLogger(__name__)
_JOIN_S: Final = 30.0
_LEAST_STUCK_S: Final = 2.0  # a busy machine is no stuck broker

Connect = Callable[[TrainerConfig, str, Will], Transport]


def state_dir_of(config: TrainerConfig) -> Path:
    """The trainer's state directory: the configured one, or the user's for this job."""
    if config.state_dir:
        return Path(config.state_dir).expanduser()
    return default_dir("trainer", config.job)


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
        config: The operator's settings.
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
    torch.set_num_threads(config.threads)
    signer = load_signer(config.job, config.signing)
    directory = prepare(state_dir_of(config))
    with ExitStack() as stack:
        stack.enter_context(locked(directory, "a trainer"))
        journal = _open_journal(directory)
        stack.callback(journal.close)
        job = Job(config, journal)
        epoch = journal.next_epoch()
        # The clock is a hint only, for a journal and a broker that are both new to a job that is not.
        election = LeaderElection(
            instance=secrets.token_hex(16),
            fence=max(journal.fence + 1, int(time.time())),
            take_over=take_over,
        )
        trace = stack.enter_context(open_trace(config.trace_path))
        metrics = TrainerMetrics(CollectorRegistry())
        metrics.set_tiers(config.tiers)
        board, broker_figures = Board(config.job, unix_s=time.time(), task=config.task), BrokerFigures()
        metrics.registry.register(broker_figures)
        metrics.registry.register(DeviceSeries(board, config.metrics_devices))
        url = ""
        if config.metrics_port >= 0:
            registry = metrics.registry
            url = stack.enter_context(serve(registry, config.metrics_port, config.metrics_host)).url

        page_url = _open_page(stack, config, board)

        def status(state: str = "online") -> TrainerStatus:
            return TrainerStatus(
                state="online" if state == "online" else "offline",
                run=journal.run,
                epoch=epoch,
                version=learner.version,
                samples=journal.samples(),
                final=learner.final,
                fence=election.fence,
                instance=election.instance,
            )

        topic = Topics(config.job).trainer_status
        last_words = TrainerStatus(
            state="offline", run=journal.run, epoch=epoch, fence=election.fence, instance=election.instance
        )
        will = Will(topic=topic, payload=signer.status(last_words))
        transport = connect(config, f"sidestream-trainer-{secrets.token_hex(16)}", will)
        gate = LeaderTransport(transport, election)
        retained = Retained()
        by_labels = TASKS[config.task].form is TargetForm.LABELS
        judge = Judge(journal, suspects=config.quarantine, by_labels=by_labels)
        publisher = Publisher(gate, journal, metrics, retained, signer)
        learner = Learner(
            config=config,
            journal=journal,
            publisher=publisher,
            metrics=metrics,
            online=lambda: ingest.online,
            trace=trace,
            directory=directory,
            judge=judge.on_loss,
        )
        inbox = Inbox(share_bytes=max(SHARE_BYTES, (1 + config.flow.window) * TARGET_MESSAGE_BYTES))
        ingest = Ingest(
            journal=journal,
            job=job,
            transport=gate,
            election=election,
            inbox=inbox,
            fleet=Fleet(config.tiers),
            metrics=metrics,
            board=board,
            broker_figures=broker_figures,
            retained=retained,
            signer=signer,
            status=status,
            learner_woken=learner.wake,
            trace=trace,
            judge=judge,
            max_batches_per_s=config.max_batches_per_s,
            held_max_bytes=config.quarantine_max_mib * 2**20,
            clock=clock,
        )
        _Threads(
            config,
            settings_file,
            transport,
            election,
            inbox,
            ingest,
            learner,
            farewell=lambda: signer.status(status("offline")),
        ).run(stop, lambda: started(url, page_url))


def _open_journal(directory: Path) -> Journal:
    """The journal, or a new one where there never was one: checkpoints do not come without."""
    path = directory / FILE_NAME
    if not path.exists() and newest_files(directory):
        raise StateError(
            f"{path} is missing, and checkpoints of it are there; restore the whole state directory from a "
            "backup, or begin anew with another --state-dir"
        )
    return Journal(path)


def _open_page(stack: ExitStack, config: TrainerConfig, board: Board) -> str:
    """Serve the fleet page until the stack is unwound; return its URL, empty if there is none."""
    if not config.page:
        return ""
    try:
        return stack.enter_context(serve_page(board, config.page_port, config.page_host)).url
    except PortInUseError as exc:
        _log.warning("there is no fleet page: %s", exc)
        return ""


class _Threads:
    """Starts the threads, waits, and stops them in order: learner, then goodbye, then ingest."""

    def __init__(
        self,
        config: TrainerConfig,
        settings_file: SettingsFile | None,
        transport: Transport,
        election: LeaderElection,
        inbox: Inbox,
        ingest: Ingest,
        learner: Learner,
        *,
        farewell: Callable[[], bytes],
    ) -> None:
        self._config = config
        self._settings_file = settings_file
        self._transport = transport
        self._election = election
        self._inbox = inbox
        self._ingest = ingest
        self._learner = learner
        self._farewell = farewell
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def run(self, stop: threading.Event, started: Callable[[], None]) -> None:
        topics = Topics(self._config.job)
        self._ingest.listen()
        threads = [
            threading.Thread(target=self._guard, args=(run,), name=name, daemon=True)
            for name, run in (("ingest", self._ingest_all), ("learner", self._learn))
        ]
        try:
            self._transport.start(self._inbox.offer)
            self._await_broker(stop)
            threads[0].start()
            while not (self._ingest.confirmed.wait(0.05) or stop.is_set() or self._failure is not None):
                continue
            if self._ingest.confirmed.is_set():
                threads[1].start()
                started()
            while not stop.wait(0.2) and self._failure is None:
                self._follow_settings()
        finally:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join(_JOIN_S)
            farewell = (topics.trainer_status, self._farewell(), 1, True)
            # One that has no say has nothing to take back: the retained status is another's.
            self._transport.close(last_words=[farewell] if self._election.active else [])
        if self._failure is not None:
            raise self._failure

    def _await_broker(self, stop: threading.Event) -> None:
        """Wait for the first connection; after that one the transport reconnects for ever."""
        wait_s = self._config.broker_wait_s
        deadline_s = time.monotonic() + wait_s
        while not stop.is_set() and not self._transport.wait_connected(0.2):
            if wait_s and time.monotonic() > deadline_s:
                raise BrokerError(
                    f"no broker within {wait_s:g} s: {self._transport.last_error}; check broker.url, or set "
                    "broker_wait_s = 0 to wait for ever"
                )

    def _follow_settings(self) -> None:
        if self._settings_file is None:
            return
        updated = self._settings_file.update(self._config, time.monotonic())
        if updated != self._config:
            self._config = updated
            self._learner.reconfigure(updated)
            self._ingest.reconfigure(updated)

    def _learn(self) -> None:
        self._learner.run(self._stop)

    def _ingest_all(self) -> None:
        while not self._stop.is_set():
            self._ingest.step()
            self._ingest.throttle(self._learner.backlog > self._config.max_backlog)

    def _guard(self, run: Callable[[], None]) -> None:
        """A thread that fails ends the process: a supervisor restarts it, and nothing is lost by that."""
        try:
            run()
        except BaseException as exc:
            self._failure = exc
