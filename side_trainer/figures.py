"""What of the trainer is shown: metrics and fleet page, brought up to date once a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from prometheus_client import CollectorRegistry

from metrics.broker_figures import BrokerFigures
from metrics.catalogue import Content, Kind, TrainerMetrics, level, total, values
from metrics.fleet_page.board import Board, Surroundings
from metrics.fleet_page.device_series import DeviceSeries
from metrics.fleet_page.fleet import MAX_DEVICES, Fleet
from metrics.fleet_page.server import PortInUseError, serve_page
from metrics.fleet_page.view import AnswersView, AssignedView, RefusedView, TrainerView
from metrics.server import serve
from metrics.telemetry import FleetExporter
from metrics.trackers.tracking import Trackers
from side_trainer.broadcast.home_assistant import HomeAssistant
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.fold.progress import Progress
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.quarantine.judge import Judge
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.messages import TrainerStatus
from sidestream.contract.plan import METHODS, SplitLora
from sidestream.contract.quality import HEADLINE
from sidestream.contract.topics import Topics

_log = logging.getLogger(__name__)

_ANSWERING = ("backward_passes", "batches_reused", "batches_changed", "gradients_lost")


class Figures:
    """Updated by the ingest thread.

    Args:
        config: Names the tiers, and where figures are served.
        journal: What there is.
        judge: Says whose batches are kept and not learnt from.
        link: Says whether there is a connection.
        job: Its plan has labels and backbones.
        progress: What is left to learn.
    """

    def __init__(
        self,
        config: TrainerConfig,
        journal: Journal,
        judge: Judge,
        link: LeaderTransport,
        job: Job,
        progress: Progress,
    ) -> None:
        self.metrics = TrainerMetrics(CollectorRegistry())
        """Counts everything."""
        self.fleet = Fleet(config.tiers)
        """The view of the devices; the ingest thread's alone."""
        self.fleet.held = judge.holds
        self.board = Board(config.job, unix_s=time.time(), task=config.task)
        """What the page shows."""
        self.assigned: Callable[[str, str], AssignedView | None] = lambda tier, device: None
        """What was chosen for a device."""
        self.broker = BrokerFigures()
        """What the broker says of itself."""
        self.online: Mapping[str, int] = {}
        """Devices online by tier, a second ago, or a few where there are thousands; for any thread."""
        self._config = config
        self._journal = journal
        self._judge = judge
        self._link = link
        self._trackers = Trackers((), config.job)
        prefix = config.broker.endpoint().topic_prefix
        self._home = HomeAssistant(link, Topics(config.job), config.home_assistant, prefix)
        self._job = job
        self._progress = progress
        self._exporter = FleetExporter(self.metrics, config.task)
        self.metrics.set_tiers(config.tiers)
        self.metrics.registry.register(self.broker)
        self.metrics.registry.register(DeviceSeries(self.board, config.metrics_devices))

    def add_tiers(self, names: Iterable[str]) -> None:
        """Show more tiers; those that are shown go on as they are."""
        self.metrics.set_tiers(names)
        self.fleet.add_tiers(names)

    def serve(self, stack: ExitStack) -> tuple[str, str]:
        """Serve metrics and page until the stack is unwound; return their URLs, empty where there is none."""
        config, metrics_url = self._config, ""
        self._trackers = stack.enter_context(Trackers(config.trackers, config.job))
        if config.metrics_port >= 0:
            served = serve(self.metrics.registry, config.metrics_port, config.metrics_host)
            metrics_url = stack.enter_context(served).url
        if not config.page:
            return metrics_url, ""
        try:
            page = stack.enter_context(serve_page(self.board, config.page_port, config.page_host))
        except PortInUseError as exc:
            _log.warning("there is no fleet page: %s", exc)
            return metrics_url, ""
        return metrics_url, page.url

    def update(self, status: TrainerStatus, now: float) -> None:
        """Show everything as it is now."""
        self.metrics.journal_bytes.set(self._journal.size_bytes())
        self.metrics.quarantined.set(self._judge.count)
        published = self._journal.highest
        finished = self._finished
        summaries = self._exporter.update(self.fleet, version=published, now=now, finished=finished)
        self.board.update(
            self.fleet,
            summaries,
            self._view(status, published),
            now=now,
            unix_s=time.time(),
            around=self._surroundings(),
        )
        self._trackers.offer(*self.board.newest())
        if self._config.home_assistant:
            devices, _ = self.board.oldest(MAX_DEVICES)
            self._home.tell(devices, HEADLINE[self._config.task], now)
        self.online = {name: tier.devices_online for name, tier in summaries.items()}

    def _surroundings(self) -> Surroundings:
        plan, reasons = self._job.plan, dict[str, str]()
        if self._judge.count:
            reasons = {device: reason for device, _, reason, _ in self._journal.holding.verdicts()}
        return Surroundings(
            held=lambda device: reasons.get(device, "") if self._judge.holds(device) else None,
            fingerprints={name: tier.fingerprint for name, tier in plan.tiers.items()},
            labels=plan.labels,
            assigned=self.assigned,
        )

    @property
    def _finished(self) -> int:
        """The version for devices that want finished ones only; 0 until this trainer has published it."""
        return int(level(self.metrics.weights_finished))

    def _view(self, status: TrainerStatus, published: int) -> TrainerView:
        metrics = self.metrics
        refused = values(metrics.messages_rejected)
        return TrainerView(
            connected=self._link.connected,
            version=status.version,
            published=published,
            finished=self._finished,
            backlog=self._journal.version_base + self._journal.tail - status.version,
            final=status.final,
            samples=status.samples,
            messages=int(values(metrics.messages_received)[(Kind.ACTIVATIONS.value,)]),
            duplicates=int(total(metrics.messages_duplicate)),
            refused=tuple(
                RefusedView(kind=kind, reason=reason, count=int(count))
                for (kind, reason), count in refused.items()
                if count
            ),
            bytes_up=int(total(metrics.up_bytes)),
            bytes_down=int(total(metrics.down_bytes)),
            inbox_dropped=int(total(metrics.inbox_dropped)),
            loss=metrics.loss,
            passes=self._config.learner.passes,
            owed_rows=max(0, self._progress.owed),
            answers=self._answers(),
        )

    def _answers(self) -> AnswersView | None:
        if not issubclass(METHODS[self._config.method], SplitLora):
            return None
        metrics, sent = self.metrics, values(self.metrics.down_bytes)
        devices = {name: int(total(metrics.device_counters[name])) for name in _ANSWERING}
        return AnswersView(
            waiting=int(level(metrics.unlearnt)),
            outstanding=int(level(metrics.replies_outstanding)),
            expired=int(total(metrics.replies_expired)),
            gradient_norm=round(level(metrics.gradient_norm), 4),
            staleness=int(level(metrics.staleness)),
            bytes_down=int(sum(size for (_, what), size in sent.items() if what == Content.GRADIENT.value)),
            backward_passes=devices["backward_passes"],
            reused=devices["batches_reused"],
            changed=devices["batches_changed"],
            lost=devices["gradients_lost"],
        )
