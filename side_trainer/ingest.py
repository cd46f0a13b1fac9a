"""The ingest thread: from the inbox to the journal, and only then the receipt.

It alone feeds the job and the fleet, so neither needs a lock.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec

from broker_config.transport import Connected, Disconnected, Event, Received
from metrics.broker_figures import BrokerFigures
from metrics.catalogue import Kind, Reason, TrainerMetrics
from metrics.fleet_page.board import Board
from metrics.fleet_page.fleet import Fleet
from side_trainer.broadcast.downlink import Downlink
from side_trainer.broadcast.leader_election import LeaderElection
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.presence import Presence
from side_trainer.broadcast.retained import Retained
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.figures import Figures
from side_trainer.job import Job
from side_trainer.journal.journal import Claim, Journal, Taken
from side_trainer.quarantine.judge import Judge
from side_trainer.receive.absence import Absences
from side_trainer.receive.inbox import Inbox, Refused, arrived, examine
from side_trainer.receive.refusals import Refusals
from side_trainer.receive.setbacks import Setbacks
from side_trainer.receive.shut_out import ShutOut
from side_trainer.receive.subscriptions import Subscriptions
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import (
    DecodeError,
    MismatchError,
    NoRoomError,
    StateError,
    StorageError,
)
from sidestream.contract.messages import (
    ActivationBatch,
    Flow,
    Status,
    Telemetry,
    TrainerStatus,
    content_digest,
)
from sidestream.contract.plan import Plan
from sidestream.contract.tensors import Floats
from sidestream.contract.topics import Topics, Uplink
from sidestream.contract.wire import pack, unpack
from sidestream.host.trace import Trace

_log = logging.getLogger(__name__)
_EXPORT_EVERY_S: Final = 1.0
_STORAGE_RETRY_S: Final = 5.0
_REPAIR_EVERY_S: Final = 5.0
_HELD: Final = 256


class _Admitted(NamedTuple):
    """A batch that may be journaled."""

    uplink: Uplink
    event: Received
    batch: ActivationBatch
    means: Floats


class Ingest:
    """Turns what devices send into journal records, receipts, plan changes and figures.

    Args:
        journal: Where batches go.
        job: What the devices' births settle.
        transport: For receipts, rejections and the plan.
        election: Whether this is the job's one trainer.
        inbox: What the network thread fills.
        fleet: The view of the devices.
        metrics: Counts everything.
        board: Shown the fleet once a second.
        broker_figures: Told what the broker says of itself.
        retained: Knows what is ours on the broker.
        signer: Signs the plan.
        status: The trainer's status, announced on every connection and when it changes.
        learner_woken: Called after new records, and after each new connection with ``True``.
        trace: Told what is done when.
        judge: Says whose batches are not learnt from.
        max_batches_per_s: A device's; 0 for no limit.
        held_max_bytes: Of quarantined devices, all together.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        job: Job,
        transport: LeaderTransport,
        election: LeaderElection,
        inbox: Inbox,
        fleet: Fleet,
        metrics: TrainerMetrics,
        board: Board,
        broker_figures: BrokerFigures,
        retained: Retained,
        signer: TrainerSigner,
        status: Callable[[], TrainerStatus],
        learner_woken: Callable[[bool], None],
        trace: Trace,
        judge: Judge,
        max_batches_per_s: float = 0.0,
        held_max_bytes: int = sys.maxsize,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._journal = journal
        self._job = job
        self._transport = transport
        self._election = election
        self.confirmed = threading.Event()
        """Set once it is certain that this is the job's one trainer."""
        self._held: list[tuple[Uplink, Received]] = []
        self._inbox = inbox
        self._fleet = fleet
        self._metrics = metrics
        self._broker_figures = broker_figures
        self._retained = retained
        self._signer = signer
        self._status = status
        self._learner_woken = learner_woken
        self._trace = trace
        self._topics = Topics(job.plan.job)
        self._downlink = Downlink(transport, self._topics, journal, election, metrics)
        self._presence = Presence(
            election, journal, transport, self._downlink, self._topics, signer, status=status
        )
        self._refusals = Refusals(
            self._downlink,
            self._topics,
            board,
            metrics,
            max_batches_per_s=max_batches_per_s,
            box=inbox.box,
        )
        self._subscriptions = Subscriptions(transport, self._topics)
        self._shut_out = ShutOut(inbox.box, self._subscriptions, self._topics, fleet, board, metrics)
        self._figures = Figures(
            journal=journal,
            inbox=inbox,
            fleet=fleet,
            transport=transport,
            board=board,
            metrics=metrics,
            task=job.plan.task,
            held=judge.holds,
        )
        self._exported = 0.0
        self._births: dict[tuple[str, str], Status] = {}
        # Streams to be told of, the current one first.
        self._greetings: dict[tuple[str, str], tuple[str, ...]] = {}
        self._backups = journal.backups
        self._setbacks = Setbacks(journal, signer)
        self._judge = judge
        self._absences = Absences()
        self._held_max_bytes = held_max_bytes
        self._paused = False
        self._connections = 0
        self._plan_due = False
        self._repaired = -_REPAIR_EVERY_S
        self._online: Mapping[str, int] = {}
        self._reconfigured: queue.SimpleQueue[TrainerConfig] = queue.SimpleQueue()

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._job.plan

    @property
    def online(self) -> Mapping[str, int]:
        """Devices online by tier, a second ago at most; for any thread."""
        return self._online

    def reconfigure(self, config: TrainerConfig) -> None:
        """Go on with more tiers, from the next step on; for any thread."""
        self._reconfigured.put(config)

    def listen(self) -> None:
        """Subscribe to everything; before the transport is started."""
        self._subscriptions.begin()

    def step(self, timeout_s: float = 0.2) -> None:
        """Handle what is in the inbox, waiting so long for the first of it."""
        self._decide()
        self._downlink.pay()
        while not self._reconfigured.empty():
            self._add_tiers(self._reconfigured.get())
        events = self._inbox.take(timeout_s)
        arrived = self._clock()
        batches: list[tuple[Uplink, Received]] = []
        for event in events:
            uplink = self._route(event)
            if uplink is not None:
                assert isinstance(event, Received)
                if not self._refusals.drops(uplink, arrived):
                    batches.append((uplink, event))
        self._stand(arrived)
        self._greet()
        self._settle_job(arrived)  # births come before the batches that go by what they settle
        if not self._election.active:  # the devices send again what finds no room here
            self._held += batches
            self._inbox.dropped += len(self._held[_HELD:])
            self._held, batches = self._held[:_HELD], []
        elif self._held:
            batches, self._held = self._held + batches, []
        if batches:
            self._take_batches(batches)
            self._metrics.ingest_seconds.observe(self._clock() - arrived)
        now = self._clock()
        self._shut_out.tick(now)
        if now - self._exported >= _EXPORT_EVERY_S:
            self._export(now)

    def _add_tiers(self, config: TrainerConfig) -> None:
        """Everything that knows tiers learns of the new ones, then the devices do."""
        if config.tiers.keys() <= self.plan.tiers.keys():
            return
        self._metrics.set_tiers(config.tiers)
        self._fleet.add_tiers(config.tiers)
        self._job.reconfigure(config)
        self._announce_plan()
        self._announce_flow()

    # --- what arrives --------------------------------------------------------------------------------

    def _route(self, event: Event) -> Uplink | None:
        """Handle everything but activations; of those, say where they came from."""
        if isinstance(event, Connected):
            self._transport.max_packet_bytes = event.max_packet_bytes
            self._on_connected()
            return None
        if isinstance(event, Disconnected):
            self._metrics.taken_over.inc(event.taken_over)
            self._presence.disconnected()
            self._absences.disconnected()
            self._metrics.broker_connected.set(0)
            self._broker_figures.clear()
            return None
        if event.topic.startswith("$"):
            self._broker_figures.take(event.topic, event.payload)
            return None
        if event.topic.startswith(f"{self._topics.base}/trainer/"):
            self._presence.on_event(event)
            return None
        if event.topic == self._topics.plan or event.topic.startswith(f"{self._topics.base}/down/"):
            self._check_retained(event)
            return None
        try:
            uplink = self._topics.parse_uplink(event.topic)
        except DecodeError as exc:
            self._refusals.reject(None, event, Reason.UNDECODABLE, str(exc))
            return None
        self._metrics.messages_received.labels(Kind(uplink.kind)).inc()
        if uplink.kind == Kind.ACTIVATIONS.value:
            self._warn_of(uplink, self._absences.on_batch(uplink.tier, uplink.device, self._clock()))
            return uplink
        if event.payload:
            self._on_report(uplink, event)
        elif uplink.kind == Kind.STATUS.value and self._fleet.forget(uplink.tier, uplink.device):
            _log.info("device %s (%s) is forgotten: its status was cleared", uplink.device, uplink.tier)
        return None

    def _on_connected(self) -> None:
        self._connections += 1
        self._metrics.broker_connected.set(1)
        if self._connections > 1:
            self._metrics.reconnects.inc()
        self._presence.connected()

    def _stand(self, now: float) -> None:
        """Start publishing at the moment from which this is certainly the job's one trainer."""
        if not self._presence.begins(now):
            return
        with contextlib.suppress(StorageError):  # it is tried again with the next telemetry
            self._setbacks.rise()
        self.confirmed.set()
        self._announce_plan()
        self._announce_flow()
        self._learner_woken(True)

    def _check_retained(self, event: Received) -> None:
        """Put the plan and the weights back if somebody else wrote over them."""
        if not self.confirmed.is_set() and event.topic.endswith("/weights") and event.payload:
            self._setbacks.on_manifest(event)
        now = self._clock()
        if self._retained.is_foreign(event.topic, event.payload) and now - self._repaired >= _REPAIR_EVERY_S:
            self._repaired = now
            _log.warning(
                "%s was written to by somebody else; publishing ours again. If this job has no other "
                "trainer, a stranger can write there: give the broker an access list, and the trainer a key "
                "to sign with (sidestream fleet init makes both)",
                event.topic,
            )
            self._announce_plan()
            self._learner_woken(True)

    def _on_report(self, uplink: Uplink, event: Received) -> None:
        """A status or telemetry message."""
        now = self._clock()
        try:
            if uplink.kind == Kind.TELEMETRY.value:
                told = unpack(Telemetry, event.payload)
                self._fleet.on_telemetry(uplink.tier, uplink.device, told, now)
                why = self._absences.on_telemetry(uplink.tier, uplink.device, told.batches_sent, now)
                self._warn_of(uplink, why)
                self._setbacks.on_telemetry(uplink, told)
                return
            status = unpack(Status, event.payload)
            news = self._fleet.on_status(uplink.tier, uplink.device, status, now)
        except DecodeError as exc:
            self._refusals.reject(uplink, event, Reason.UNDECODABLE, str(exc))
        except MismatchError as exc:
            self._refusals.reject(uplink, event, Reason.UNKNOWN_TIER, str(exc))
        except StorageError as exc:
            _log.error("%s; what a device has lost is noted when it next tells", exc)
        else:
            if news:
                self._greetings[uplink.tier, uplink.device] = (status.stream, *status.kept_streams)
            if news and status.state == "online":
                _log.info("device %s (%s) is online", uplink.device, uplink.tier, extra=_about(uplink))
                self._births[uplink.tier, uplink.device] = status
            elif news:
                _log.info(
                    "device %s (%s) is offline: %s",
                    *(uplink.device, uplink.tier, status.reason),
                    extra=_about(uplink),
                )

    @staticmethod
    def _warn_of(uplink: Uplink, why: str) -> None:
        if why:
            _log.warning("device %s (%s) %s", uplink.device, uplink.tier, why, extra=_about(uplink))

    def _settle_job(self, now: float) -> None:
        """Let the job learn from births; those that the disk has no room for wait here."""
        try:
            changed = self._job.tick(now)
            while self._births:
                (tier, device), status = next(iter(self._births.items()))
                changed = self._job.on_birth(tier, device, status, now) or changed
                del self._births[tier, device]
        except StateError as exc:
            self._plan_due = self._plan_due or changed
            self._on_storage_failure(exc)
            return
        if changed:
            self._announce_plan()

    def _greet(self) -> None:
        """Tell devices that came what of their streams is here: it may be less than they were told before."""
        while self._greetings and self._election.active:
            (tier, device), (current, *earlier) = self._greetings.popitem()
            uplink = Uplink(tier=tier, device=device, kind=Kind.STATUS.value)
            for stream in earlier:
                self._downlink.receipt(uplink, stream, retain=False)
            self._downlink.receipt(uplink, current)

    def _follow_backups(self) -> None:
        """Tell devices once a backup has been made: they need not keep what is in it."""
        backups = self._journal.backups
        if backups != self._backups:
            self._backups = backups
            for one in self._fleet.by_age():
                self._greetings[one.tier, one.name] = (one.stream,)

    # --- batches -------------------------------------------------------------------------------------

    def _take_batches(self, arrived: list[tuple[Uplink, Received]]) -> None:
        """Check, journal in one commit, then send the receipts."""
        began = self._trace.now()
        admitted: list[_Admitted] = []
        for uplink, event in arrived:
            try:
                batch, means = examine(event.payload, uplink.tier, self.plan, self._job.policies)
            except Refused as exc:
                self._refusals.refuse(uplink, event, exc)
                continue
            admitted.append(_Admitted(uplink, event, batch, means))
        if not admitted:
            return
        started = self._clock()
        try:
            journaled = self._journal_batches(admitted)
        except StateError as exc:
            self._on_storage_failure(exc)
            return
        self._metrics.journal_commit_seconds.observe(self._clock() - started)
        if self._paused:
            self._pause(False)
        for uplink, stream in {(one.uplink, one.batch.stream): None for one in journaled}:
            self._downlink.receipt(uplink, stream)
            self._shut_out.honest(uplink.tier, uplink.device)
        taken = [f"{one.uplink.device} {one.batch.sequence}" for one in journaled]
        self._trace.add("ingest", "ingest", began, batches=taken)
        self._learner_woken(False)

    def _journal_batches(self, admitted: list[_Admitted]) -> list[_Admitted]:
        """Append what is new; return everything that is in the journal now and may be receipted."""
        taken: list[tuple[_Admitted, Taken | None]] = []  # None: no room
        with self._journal.transaction():
            for one in admitted:
                held = self._judge.holds(one.uplink.device)
                done: Taken | None = None
                with contextlib.suppress(NoRoomError):
                    done = self._journal.append_batch(
                        arrived(one.batch, one.event.payload, one.uplink.tier, one.uplink.device),
                        held=held,
                        held_max_bytes=self._held_max_bytes,
                    )
                taken.append((one, done))
        for one, done in taken:
            if done is None:
                self._refusals.have_wait(one.uplink, one.event, one.batch, self._held_max_bytes)
            elif done.claim is Claim.FORKED:
                self._on_fork(one)
            else:
                self._count(one, done)
        return [one for one, done in taken if done is not None and done.claim is not Claim.FORKED]

    def _on_fork(self, one: _Admitted) -> None:
        """Its device goes on with another stream."""
        self._metrics.messages_forked.labels(one.uplink.tier).inc()
        self._setbacks.on_fork(one.uplink, one.batch.stream)
        self._downlink.receipt(
            one.uplink,
            one.batch.stream,
            forked_sequence=one.batch.sequence,
            forked_digest=content_digest(one.batch),
        )

    def _count(self, one: _Admitted, done: Taken) -> None:
        tier = one.uplink.tier
        self._metrics.up_bytes.labels(tier).inc(len(one.event.payload))
        self._metrics.samples_repeated.labels(tier).inc(done.repeated)
        if done.claim is Claim.KNOWN:
            self._metrics.messages_duplicate.labels(tier).inc()
        elif not self._judge.holds(one.uplink.device):
            self._metrics.messages_journaled.labels(tier).inc()
            self._metrics.samples_journaled.labels(tier).inc(done.samples)
            self._judge.on_batch(tier, one.uplink.device, one.batch, one.means)

    def _on_storage_failure(self, exc: StateError) -> None:
        """Nothing was receipted, so nothing is lost: the devices keep it. Ask them to wait, and try again."""
        _log.error(
            "%s; the devices are paused and keep their data. Free disk space, or mend the state directory",
            exc,
        )
        self._pause(True)
        time.sleep(_STORAGE_RETRY_S)
        self._pause(False)

    # --- devices that are up to no good --------------------------------------------------------------

    def _decide(self) -> None:
        try:
            self._judge.decide()
        except StateError as exc:
            self._on_storage_failure(exc)

    def _follow_operator(self) -> None:
        """Do what was decided on the command line meanwhile."""
        try:
            let_go = self._judge.follow_operator()
        except StorageError as exc:
            let_go = []
            self._on_storage_failure(exc)
        for tier, samples in let_go:
            self._metrics.messages_journaled.labels(tier).inc()
            self._metrics.samples_journaled.labels(tier).inc(samples)
        self._metrics.quarantined.set(self._judge.count)

    # --- announcements -------------------------------------------------------------------------------

    def _announce_plan(self) -> None:
        plan = self._signer.plan(msgspec.structs.replace(self.plan, fence=self._election.fence))
        self._retained.publishing(self._topics.plan, plan)
        self._plan_due = not self._downlink.send(self._topics.plan, plan, retain=True)
        self._learner_woken(False)

    def _announce_flow(self) -> None:
        flow = pack(Flow(window=self.plan.flow.window, pause=self._paused))
        for tier in self.plan.tiers:
            self._downlink.send(self._topics.flow(tier), flow, retain=True, tier=tier)

    def throttle(self, behind: bool) -> None:
        """Pause the devices, or let them go on."""
        if behind != self._paused:
            self._pause(behind)

    def _pause(self, pause: bool) -> None:
        self._paused = pause
        self._announce_flow()

    def _export(self, now: float) -> None:
        """Bring the metrics and the trainer's retained status up to date."""
        self._exported = now
        self._follow_operator()
        self._follow_backups()
        if self._plan_due:
            self._announce_plan()
        self._presence.tell()
        self._online = self._figures.update(self._status(), now)


def _about(uplink: Uplink) -> dict[str, str]:
    """Where a message came from, for a log that is for programs."""
    return {"device": uplink.device, "tier": uplink.tier}
