"""One stay in a job: connected, under one plan, until done, stopped, or the plan becomes another one.

The main thread handles what the network says, sends what waits in the outbox, and tells the work
(:mod:`edge_agent.session.work`), which has a thread of its own. Network callbacks only fill the mailbox. The
first failure of either thread ends the session.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from functools import partial

from broker_config.errors import NotConnected, PublishTimeout
from broker_config.settings import masked_url
from broker_config.transport import Connected, Disconnected, Event, LastWord, Received
from edge_agent.context import AgentContext
from edge_agent.samples.sources import open_source
from edge_agent.session.mailbox import Mailbox
from edge_agent.session.other_jobs import OtherJobs
from edge_agent.session.outcome import Outcome
from edge_agent.session.own_status import OwnStatus
from edge_agent.session.plan_inbox import PlanInbox, PlanVerdict
from edge_agent.session.receipts import Receipts
from edge_agent.session.telemetry import TelemetryReport
from edge_agent.session.work import Work
from edge_agent.uplink.in_flight import InFlight
from edge_agent.uplink.link_state import LinkState
from edge_agent.uplink.sender import Sender
from edge_agent.weights.choice import VersionChoice
from edge_agent.weights.weights_inbox import WeightsInbox
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import (
    BrokerError,
    DataError,
    OutdatedError,
    SidestreamError,
    UntrustedError,
    WireError,
)
from sidestream.contract.messages import Flow, TrainerStatus, WeightsChunk
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack

_TICK_S = 0.25  # news wake it
log = logging.getLogger(__name__)


class Session:
    """See the module. Use it once: :meth:`run`."""

    def __init__(self, context: AgentContext) -> None:
        config, outbox, tier, name = context.config, context.outbox, context.tier, context.name
        self._context = context
        self._topics = topics = Topics(config.job)
        self._source = context.stream or open_source(config.data, outbox.folder)
        self._mailbox = Mailbox(lambda event: self._receipts.stream_of(event))
        self._link = link = LinkState(self._mailbox.wake)
        self._in_flight = InFlight(link, metrics=context.metrics, trace=context.trace, clock=context.clock)
        self._plans = PlanInbox(config.job, tier, outbox, context.trust, clock=context.clock)
        self._status = OwnStatus(context, topics.status(tier, name), self._source, link)
        self._transport = context.connect(config, context.client_id, self._status.will())
        self._weights = WeightsInbox(
            self._transport,
            *(topics.weights(tier), topics.final_weights(tier)),
            VersionChoice(config.weights, config.weights_budget_mib, outbox.counters()["weights_bytes_down"]),
        )
        self._receipts = Receipts(
            topics.receipt(tier, name),
            outbox,
            plans=self._plans,
            weights=self._weights,
            link=link,
            in_flight=self._in_flight,
        )
        self._report = TelemetryReport(context, topics.telemetry(tier, name), self._mailbox, self._in_flight)
        self._sender = Sender(
            outbox,
            self._transport,
            *(topics.activations(tier, name), topics.adapter(tier, name)),
            link=link,
            in_flight=self._in_flight,
            trace=context.trace,
            budget=context.budget,
        )
        self._work = Work(
            context,
            self._source,
            link,
            plans=self._plans,
            weights=self._weights,
            subscribe=self._transport.subscribe,
            on_backbone=self._on_backbone,
            on_news=self._on_news,
        )
        self._outcomes: set[Outcome] = set()
        look = partial(context.connect, config, f"sidestream-look-{secrets.token_hex(16)}", None)
        self._other_jobs = OtherJobs(config.job, look, context.clock)

    def run(self, *, patience_s: float, started: Callable[[], None]) -> Outcome:
        """Stay until there is an outcome.

        Args:
            patience_s: Give up if the broker cannot be reached for so long; 0 tries for ever.
            started: Called once there is a connection.

        Raises:
            SidestreamError: something that the user has to mend.
        """
        topics, tier = self._topics, self._context.tier
        # The plan last: it sets the work going, and what is retained on the others should be known by then.
        states = (self._status.topic, topics.trainer_status, topics.flow(tier), self._receipts.topic)
        for topic in states:
            self._transport.subscribe(topic)
        self._weights.listen()
        self._transport.subscribe(topics.plan)
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

    def _loop(self) -> Outcome:
        while (outcome := self._outcome()) is None:
            for event in self._mailbox.take(min(self._sender.due_s or _TICK_S, _TICK_S)):
                try:
                    self._on_event(event)
                except WireError as exc:
                    topic = event.topic if isinstance(event, Received) else "the connection"
                    log.error("a message on %s cannot be used: %s", topic, exc)
            self._tick()
            while self._sender.send_next():  # a window of them, until there are receipts
                pass
        return outcome

    def _outcome(self) -> Outcome | None:
        if self._work.failure is not None:
            raise self._work.failure
        if self._context.stop.is_set():
            self._outcomes.add(Outcome.STOPPED)
        elif not self._outcomes and self._context.config.exit_when_done and self._is_done():
            self._outcomes.add(Outcome.DONE)
        return next((outcome for outcome in Outcome if outcome in self._outcomes), None)

    def _is_done(self) -> bool:
        """Everything is receipted, and the version in use is final, has learnt from it, and is measured."""
        in_use, newest = self._work.in_use, self._weights.newest
        if not self._work.produced or in_use is None or in_use.score is None:
            return False
        if newest is None or not newest.final or newest.bundle_digest != in_use.bundle_digest:
            return False
        with self._context.outbox.unlabelled() as store:
            labels_pending = store.pending() > 0
        return not labels_pending and self._receipts.all_in()

    def _tick(self) -> None:
        now, status, plans = self._context.clock(), self._status, self._plans
        self._on_verdict(plans.stands(now, working=self._work.begun))
        known = {"labels_known": bool(status.labels), "loaded": status.backbone is not None}
        plans.check_tier(now, working=self._work.begun, **known)
        plans.check_backbone(status.backbone)
        self._other_jobs.tick(now, waiting=plans.waits)
        if plans.plan is not None:
            status.offer_labels(plans.plan, now)
        self._weights.tick()
        if status.due and Outcome.DUPLICATE not in self._outcomes:
            status.due = False  # before it is made: what the backbone's thread has to tell is another one
            if self._publish(status.birth()):
                status.writes.said(now)
            else:
                status.due = True
        status.writes.check(now, self._transport.refused)
        unanswered_s = self._in_flight.unanswered_s if self._link.trainer_online else 0.0
        status.writes.check_batches(now, unanswered_s)
        if self._report.is_due(now):
            word = self._report.take(
                now,
                self._work.in_use,
                source_ended=self._work.produced,
                trouble=self._trouble(),
                final_only=self._weights.final_only,
                assignment=self._work.assignment,
            )
            if word is not None and self._link.connected:
                self._publish(word)

    def _trouble(self) -> str:
        """In words, what keeps the device from working, or what it waits for."""
        link = self._link
        if self._status.writes.trouble:
            return self._status.writes.trouble
        if link.waits:
            return "the trainer has no room for what it sends"
        if link.flow is not None and link.flow.pause:
            return "the trainer has its tier pause"
        labels, loaded = bool(self._status.labels), self._status.backbone is not None
        if self._work.begun:
            if self._work.lacks_codebooks:
                return "waits for its tier's codebooks, which the trainer hands out"
            return "" if loaded else "waits until its backbone is loaded"
        return self._plans.trouble(labels_known=labels, loaded=loaded)

    # --- what the network says ---------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._link.max_packet_bytes = event.max_packet_bytes
            if self._link.connections:
                self._context.metrics.reconnects.inc()
            self._on_connection(True)
            self._status.due = self._report.due = True
        elif isinstance(event, Disconnected):
            self._on_connection(False)
            self._context.metrics.taken_over.inc(event.taken_over)
            self._status.writes.disconnected()
        elif event.payload:  # an empty one only says that a retained message was taken back
            self._on_message(event)

    def _on_connection(self, up: bool) -> None:
        self._link.connection(up)
        self._context.metrics.broker_connected.set(up)

    def _on_message(self, event: Received) -> None:
        topics, tier, payload = self._topics, self._context.tier, event.payload
        if event.topic == topics.plan:
            self._on_verdict(self._plans.on_plan(payload, working=self._work.begun))
        elif event.topic == self._receipts.topic:
            if self._receipts.take(payload):
                self._outcomes.add(Outcome.SET_BACK)
        elif event.topic == self._status.topic:
            if (outcome := self._status.hear(payload, retained=event.retained)) is not None:
                self._outcomes.add(outcome)
        elif event.topic == topics.flow(tier):
            self._on_flow(unpack(Flow, payload))
        elif event.topic == topics.trainer_status:
            trainer, link = unpack(TrainerStatus, payload), self._link
            if trainer.state == "online" and (not link.trainer_online or trainer.fence != link.trainer_fence):
                self._report.tell_anew()
            link.trainer_online = trainer.state == "online"
            link.trainer_fence = trainer.fence
        elif f"{event.topic}/".startswith(f"{topics.weights(tier)}/"):
            self._on_weights(event.topic, payload)
        else:
            self._work.on_message(event.topic, payload)

    def _on_verdict(self, verdict: PlanVerdict) -> None:
        plan, tier = self._plans.plan, self._plans.tier
        if verdict is PlanVerdict.UNTRUSTED:
            self._context.outbox.count("weights_refused", 1)
        elif verdict is PlanVerdict.START_OVER:
            self._outcomes.add(Outcome.NEW_PLAN)
        elif verdict is PlanVerdict.IN_FORCE and plan is not None:
            self._context.metrics.plan_revision.set(plan.revision)
            if tier is not None:
                self._work.on_plan(plan)

    def _on_weights(self, topic: str, payload: bytes) -> None:
        self._context.outbox.count("weights_bytes_down", len(payload))
        self._weights.received(len(payload))
        final = topic == self._topics.final_weights(self._context.tier)
        if final or topic == self._topics.weights(self._context.tier):
            self._on_manifest(payload, final=final)
        else:
            self._topics.parse_weights_chunk(topic)
            self._weights.on_chunk(unpack(WeightsChunk, payload))

    def _on_manifest(self, payload: bytes, *, final: bool) -> None:
        try:
            manifest = self._context.trust.open_manifest(payload)
        except UntrustedError as exc:
            if final and isinstance(exc, OutdatedError):  # it has had passing versions since
                log.info("a finished version stays where it is: %s", exc)
                return
            log.error("weights are not adopted: %s", exc)
            self._context.outbox.count("weights_refused", 1)
            return
        self._weights.on_manifest(manifest)

    def _on_flow(self, flow: Flow) -> None:
        if self._link.flow != flow:
            log.info("flow: window %d%s", flow.window, ", paused" if flow.pause else "")
        self._link.set_flow(flow)

    # --- what the device says ----------------------------------------------------------------------------

    def _on_news(self) -> None:
        self._report.due = True
        self._mailbox.wake()

    def _on_backbone(self, backbone: Backbone) -> None:
        self._status.tell_backbone(backbone)
        self._mailbox.wake()

    def _publish(self, word: LastWord) -> bool:
        try:
            self._transport.publish(word.topic, word.payload, qos=word.qos, retain=word.retain, timeout_s=2.0)
        except (NotConnected, PublishTimeout) as exc:
            log.debug("not published on %s: %s", word.topic, exc)
            return False
        self._context.outbox.count("bytes_up", len(word.payload))
        if self._context.budget is not None:
            self._context.budget.spent(len(word.payload))
        return True

    # --- beginning and end -------------------------------------------------------------------------------

    def _wait_for_broker(self, patience_s: float) -> bool:
        context = self._context
        url, started = masked_url(context.config.broker.url), time.monotonic()
        log.info("connecting to %s as %s (tier %s)", url, context.name, context.tier)
        while not self._transport.wait_connected(_TICK_S):
            if context.stop.is_set():
                return False
            if patience_s and time.monotonic() - started > patience_s:
                why = self._transport.last_error or "no answer"
                raise BrokerError(f"the broker at {url} cannot be reached: {why}")
        return True

    def _close(self, reason: str) -> None:
        """Stop the work, then take leave."""
        self._work.stop()
        if self._context.stream is None:
            self._source.close()
        words: list[LastWord] = []
        if Outcome.DUPLICATE not in self._outcomes:  # else what stands on our topics is the other's
            now, work = self._context.clock(), self._work
            self._report.due = True
            figures = self._report.take(
                now,
                work.in_use,
                source_ended=work.produced,
                final_only=self._weights.final_only,
                assignment=work.assignment,
                qos=1,
            )
            words = [one for one in (figures, self._status.death(reason)) if one is not None]
        self._transport.close(last_words=words)
