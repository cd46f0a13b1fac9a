"""One stay in a job: connected, under one plan, until done, stopped, or the plan becomes another one.

The main thread handles what the network says and tells the work (:mod:`edge_agent.session.work`),
which has threads of its own. Network callbacks only fill the mailbox. The first failure of any thread ends
the session.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from functools import partial

from broker_config.errors import NotConnected, PublishTimeout
from broker_config.settings import masked_url
from broker_config.transport import Connected, Disconnected, Event, LastWord, Received
from edge_agent.batches.targets import names_in
from edge_agent.samples.sources import open_source
from edge_agent.session.device import Device
from edge_agent.session.mailbox import Mailbox
from edge_agent.session.plan_inbox import PlanInbox, Verdict
from edge_agent.session.reporter import Reporter
from edge_agent.session.work import Work
from edge_agent.session.write_check import WriteCheck
from edge_agent.weights.weights_inbox import WeightsInbox
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import (
    BrokerError,
    DataError,
    SidestreamError,
    StorageError,
    UntrustedError,
    WireError,
)
from sidestream.contract.messages import (
    Flow,
    Receipt,
    Status,
    TrainerStatus,
    WeightsChunk,
)
from sidestream.contract.plan import Plan
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack

_TICK_S = 0.1
_SETTLE_S = 10.0  # after the last receipt, so long without a newer version means that none is coming
_TELEMETRY_SHARE = 0.1  # of a budget for the link
log = logging.getLogger(__name__)


class Outcome(enum.Enum):
    """Why a session ended."""

    STOPPED = "stopped"
    DONE = "done"
    NEW_PLAN = "new plan"
    NAMESAKE = "another agent has this device's name"
    SET_BACK = "its state was set back, or copied"


class Session:
    """See the module. Use it once: :meth:`run`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._config = device.config
        self._outbox = device.outbox
        self._tier = device.tier
        self._topics = Topics(device.config.job)
        self._source = device.stream or open_source(device.config.data, device.outbox.folder)
        self._receipts = self._topics.receipt(device.tier, device.name)
        self._mailbox = Mailbox(self._stream_of)
        self._reporter = Reporter(
            device.outbox,
            self._topics,
            tier=device.tier,
            name=device.name,
            instance=device.instance,
            metrics=device.metrics,
        )
        self._transport = device.connect(device.config, device.client_id, self._reporter.will())
        self._weights = WeightsInbox(self._transport, self._topics.weights(device.tier))
        self._writes = WriteCheck(device.name, device.tier, device.metrics)
        self._plans = PlanInbox(
            device.config.job, device.tier, device.outbox, device.trust, clock=device.clock
        )
        self._work = Work(
            device,
            self._source,
            self._transport,
            self._topics.activations(device.tier, device.name),
            plans=self._plans,
            weights=self._weights,
            on_backbone=self._on_backbone,
            on_news=self._on_news,
            on_refused=self._on_refused,
        )
        self._flow: Flow | None = None
        self._new_plan = False
        self._duplicate = False
        self._set_back = False
        self._trainer_online = False
        self._waits = False  # the trainer has no room for what we send
        self._connected = False
        self._connections = 0
        self._bytes_down = 0
        self._messages_dropped = 0
        self._birth_due = self._telemetry_due = False
        self._telemetry_s = 0.0
        self._telemetry_every_s = device.config.telemetry_every_s
        self._spoken_fence = 0  # of the last receipt for our stream
        self._last_receipt: tuple[int, float] | None = None  # the newest version then, and when it came
        self._looked_s = float("-inf")

    def run(self, *, patience_s: float, started: Callable[[], None]) -> Outcome:
        """Stay until there is an outcome.

        Args:
            patience_s: Give up if the broker cannot be reached for so long; 0 tries for ever.
            started: Called once there is a connection.

        Raises:
            SidestreamError: something that the user has to mend.
        """
        topics, tier = self._topics, self._tier
        # The plan last: it sets the work going, and what is retained on the others should be known by then.
        own = topics.status(tier, self._device.name)
        trainer = topics.trainer_status
        for topic in (own, trainer, topics.flow(tier), self._receipts, topics.weights(tier), topics.plan):
            self._transport.subscribe(topic)
        self._transport.start(self._mailbox.put)
        reason = "failed"
        try:
            if self._wait_for_broker(patience_s):
                started()
            outcome = self._loop()
            reason = "goodbye"
        except SidestreamError as exc:
            # An error of the data may quote it, and a status is for all to read.
            quotes = isinstance(exc, DataError)
            reason = "its data cannot be read; its own log says why" if quotes else str(exc)[:500]
            raise
        finally:
            self._close(reason)
        return outcome

    # --- the main thread ---------------------------------------------------------------------------------

    def _loop(self) -> Outcome:
        while (outcome := self._outcome()) is None:
            for event in self._mailbox.take(_TICK_S):
                try:
                    self._on_event(event)
                except WireError as exc:
                    topic = event.topic if isinstance(event, Received) else "the connection"
                    log.error("a message on %s cannot be used: %s", topic, exc)
            self._tick()
        return outcome

    def _outcome(self) -> Outcome | None:
        if self._work.failure is not None:
            raise self._work.failure
        if self._device.stop.is_set():
            return Outcome.STOPPED
        if self._duplicate:
            return Outcome.NAMESAKE
        if self._new_plan:
            return Outcome.NEW_PLAN
        if self._set_back:
            return Outcome.SET_BACK
        return Outcome.DONE if self._config.exit_when_done and self._is_done() else None

    def _is_done(self) -> bool:
        """Everything is receipted, and the version in use is final, has learnt from it, and is measured."""
        in_use, newest = self._work.in_use, self._weights.newest
        if self._plan is None or self._spoken_fence < self._plan.fence:
            return False  # a trainer that was started since, from a backup perhaps, may lack what it had
        if not self._work.produced or in_use is None or in_use.score is None:
            return False
        if self._labels_pending() or self._outbox.size()[0]:
            return False
        if newest is None or not newest.final or newest.version != in_use.version:
            return False
        if self._last_receipt is None:
            return True
        version_then, receipt_s = self._last_receipt
        return newest.version > version_then or time.monotonic() - receipt_s > _SETTLE_S

    def _labels_pending(self) -> bool:
        with self._outbox.unlabelled() as store:
            return store.pending() > 0

    @property
    def _plan(self) -> Plan | None:
        return self._plans.plan

    def _tick(self) -> None:
        now = self._device.clock()
        self._on_verdict(self._plans.stands(now, working=self._work.begun))
        self._plans.check_tier(now, working=self._work.begun, labels_known=bool(self._reporter.labels))
        self._plans.check_backbone(self._reporter.backbone)
        self._offer_labels(now)
        self._weights.tick()
        if self._birth_due and not self._duplicate:
            self._say_birth(now)
        self._writes.check(now, self._transport.refused)
        self._writes.check_batches(now, self._work.unanswered_s if self._trainer_online else 0.0)
        if self._telemetry_due or now - self._telemetry_s >= self._telemetry_every_s:
            self._telemetry_due, self._telemetry_s = False, now
            word = self._telemetry()
            if self._connected:
                self._publish(word)
            if (link := self._device.link) is not None:
                least_s = link.seconds_of(len(word.payload)) / _TELEMETRY_SHARE
                self._telemetry_every_s = max(self._config.telemetry_every_s, least_s)

    def _say_birth(self, now: float) -> None:
        # Before it is made: what the backbone's thread has to tell meanwhile is another one.
        self._birth_due = False
        if self._publish(self._reporter.birth()):
            self._writes.said(now)
        else:
            self._birth_due = True

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._on_connected(event)
        elif isinstance(event, Disconnected):
            self._set_connected(False)
            self._device.metrics.taken_over.inc(event.taken_over)
            self._writes.disconnected()
        elif event.payload:  # an empty one only says that a retained message was taken back
            self._on_message(event)

    def _on_connected(self, event: Connected) -> None:
        self._work.max_packet_bytes = event.max_packet_bytes
        self._connections += 1
        if self._connections > 1:
            self._device.metrics.reconnects.inc()
        self._set_connected(True)
        self._birth_due = self._telemetry_due = True

    def _set_connected(self, connected: bool) -> None:
        self._connected = connected
        self._device.metrics.broker_connected.set(connected)
        self._work.connection(connected)

    def _on_message(self, event: Received) -> None:
        topics, tier = self._topics, self._tier
        if event.topic == topics.plan:
            self._on_plan(event.payload)
        elif event.topic == self._receipts:
            self._on_receipt(unpack(Receipt, event.payload))
        elif event.topic == topics.status(tier, self._device.name):
            self._on_own_status(unpack(Status, event.payload), retained=event.retained)
        elif event.topic == topics.flow(tier):
            self._on_flow(unpack(Flow, event.payload))
        elif event.topic == topics.weights(tier):
            self._on_manifest(event.payload)
        elif event.topic == topics.trainer_status:
            self._trainer_online = unpack(TrainerStatus, event.payload).state == "online"
        else:
            topics.parse_weights_chunk(event.topic)
            self._weights.on_chunk(unpack(WeightsChunk, event.payload))

    def _on_own_status(self, status: Status, *, retained: bool) -> None:
        """What stands there is ours, an earlier life's, or another agent's under the same name."""
        if self._reporter.is_own(status):
            if not retained:
                self._writes.heard()
        elif self._reporter.gives_way_to(status) and self._is_there(status, retained):
            self._duplicate = True
        elif not retained:  # what stands there now is not ours: the other is to hear that we are here
            self._birth_due = True
        elif self._reporter.counts_below(status):
            # Of a life that this outbox, set back to an earlier state, knows nothing of.
            self._reporter.rise_above(status)
            self._set_back = True

    def _is_there(self, status: Status, retained: bool) -> bool:
        """Whether a status on our topic is no earlier life's."""
        return self._connections > 1 or (not retained and status.state == "online")

    # --- the plan ----------------------------------------------------------------------------------------

    def _on_plan(self, payload: bytes) -> None:
        self._on_verdict(self._plans.on_plan(payload, working=self._work.begun))

    def _on_verdict(self, verdict: Verdict) -> None:
        if verdict is Verdict.UNTRUSTED:
            self._on_refused()
        self._new_plan = self._new_plan or verdict is Verdict.START_OVER
        plan, tier = self._plan, self._plans.tier
        if verdict is not Verdict.IN_FORCE or plan is None:
            return
        self._device.metrics.plan_revision.set(plan.revision)
        if tier is not None:
            self._work.on_plan(plan, tier)

    def _offer_labels(self, now: float) -> None:
        """Tell the trainer which label names there are, as long as it looks for some."""
        if self._plan is None or not self._plan.lacks_labels:
            return
        if now - self._looked_s >= self._config.data.poll_s:
            self._looked_s = now
            labels = self._source.labels(partial(names_in, self._plan.task))
            if labels != self._reporter.labels:
                self._reporter.labels, self._birth_due = labels, True

    # --- receipts and flow --------------------------------------------------------------------------------

    def _stream_of(self, event: Received) -> str:
        """Of a receipt: the trainer tells of every stream that we had, one after the other."""
        if event.topic != self._receipts or not event.payload:
            return ""
        try:
            return unpack(Receipt, event.payload).stream
        except WireError:
            return ""

    def _on_receipt(self, receipt: Receipt) -> None:
        if self._plans.is_deposed(receipt.fence):
            return
        if receipt.stream == self._outbox.stream:
            self._spoken_fence = receipt.fence
            self._on_wait(receipt)
            self._on_refusal(receipt)
        try:
            ruling = self._plan is not None and receipt.fence == self._plan.fence
            settled = self._outbox.receipt(receipt, ruling=ruling)
        except StorageError as exc:
            # They are sent again, receipted again, and settled once there is room to write that down.
            log.error("receipted batches cannot be settled now: %s", exc)
            return
        self._set_back = self._set_back or settled.forked
        if settled.returned:
            self._work.send_again()
        if settled.sequences:
            self._last_receipt = (self._weights.version, time.monotonic())
            self._work.receipted(settled.sequences)

    def _on_wait(self, receipt: Receipt) -> None:
        if receipt.wait and not self._waits:
            log.error(
                "the trainer has no room for what this device sends: %s. The device keeps it, and asks again "
                "now and then",
                receipt.reason,
            )
        self._waits = receipt.wait
        self._work.set_waits(receipt.wait)

    def _on_refusal(self, receipt: Receipt) -> None:
        sequence = receipt.refused_sequence
        if sequence and self._outbox.refuse(receipt.stream, sequence, receipt.refused_digest):
            log.error("the trainer refused batch %d: %s", sequence, receipt.reason)
            self._work.send_again()

    def _on_manifest(self, payload: bytes) -> None:
        try:
            manifest = self._device.trust.open_manifest(payload)
        except UntrustedError as exc:
            log.error("weights are not adopted: %s", exc)
            self._on_refused()
            return
        self._weights.on_manifest(manifest)

    def _on_flow(self, flow: Flow) -> None:
        if self._flow != flow:
            log.info("flow: window %d%s", flow.window, ", paused" if flow.pause else "")
        self._flow = flow
        self._work.set_flow(flow)

    # --- what the work tells, on threads of its own -------------------------------------------------------

    def _on_backbone(self, backbone: Backbone) -> None:
        self._reporter.backbone, self._birth_due = backbone, True

    def _on_news(self) -> None:
        self._telemetry_due = True

    def _on_refused(self) -> None:
        self._outbox.count("weights_refused", 1)

    # --- what the device says ----------------------------------------------------------------------------

    def _telemetry(self, qos: int = 0) -> LastWord:
        received = self._mailbox.bytes_received
        self._outbox.count("bytes_down", received - self._bytes_down)
        self._bytes_down = received
        dropped = self._mailbox.dropped
        self._outbox.count("messages_dropped", dropped - self._messages_dropped)
        self._messages_dropped = dropped
        return self._reporter.telemetry(self._work.in_use, source_ended=self._work.produced, qos=qos)

    def _publish(self, word: LastWord) -> bool:
        try:
            self._transport.publish(word.topic, word.payload, qos=word.qos, retain=word.retain, timeout_s=2.0)
        except (NotConnected, PublishTimeout) as exc:
            log.debug("not published on %s: %s", word.topic, exc)
            return False
        self._outbox.count("bytes_up", len(word.payload))
        if self._device.link is not None:
            self._device.link.spent(len(word.payload))
        return True

    # --- beginning and end -------------------------------------------------------------------------------

    def _wait_for_broker(self, patience_s: float) -> bool:
        url, started = masked_url(self._config.broker.url), time.monotonic()
        log.info("connecting to %s as %s (tier %s)", url, self._device.name, self._tier)
        while not self._transport.wait_connected(_TICK_S):
            if self._device.stop.is_set():
                return False
            if patience_s and time.monotonic() - started > patience_s:
                why = self._transport.last_error or "no answer"
                raise BrokerError(f"the broker at {url} cannot be reached: {why}")
        return True

    def _close(self, reason: str) -> None:
        """Stop the threads, then take leave."""
        self._work.stop()
        if self._device.stream is None:
            self._source.close()
        # What stands on our topics is the other's, if there is one of our name.
        words = [] if self._duplicate else [self._telemetry(qos=1), self._reporter.death(reason)]
        self._transport.close(last_words=words)
