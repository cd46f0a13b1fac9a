"""What the device reports: to the trainer, in its metrics, and in its own log.

Every few seconds while it has something to tell, and rarely while nothing but its clock and its machine's
figures change.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import msgspec

from broker_config.transport import LastWord
from edge_agent.context import AgentContext
from edge_agent.session.machine import memory_bytes, temperature_celsius
from edge_agent.session.mailbox import Mailbox
from edge_agent.store.outbox import Outbox
from edge_agent.uplink.in_flight import InFlight
from edge_agent.weights.adoption import InUse
from metrics.accounts import account
from metrics.catalogue import total
from metrics.telemetry import DeviceExporter
from sidestream.backbone.memory import free_memory_bytes
from sidestream.contract.messages import Telemetry
from sidestream.contract.wire import pack

_PROGRESS_S = 10.0
_LINK_SHARE = 0.1  # of a budget for the link
_REST = 12
"""While nothing changes, reports are as much rarer,"""
_REST_S = 60.0
"""but come this often: in half of the time after which the trainer's page calls a device silent."""
_NO_NEWS = {
    "unix_s": 0.0,
    "rss_bytes": 0,
    "peak_rss_bytes": 0,
    "memory_free_bytes": 0,
    "temperature_celsius": None,
    "receipt_s": None,
    "sending_seconds": 0.0,
    "bytes_up": 0,  # a report is counted too
    "bytes_down": 0,
}
"""What alone is no reason to report again so soon, with values in its place to compare the rest."""
log = logging.getLogger(__name__)


class TelemetryReport:
    """Takes the figures when they are due; who holds it sends them.

    Args:
        context: Whose figures.
        topic: Where they go.
        mailbox: Has counted some of them.
        in_flight: Knows how long receipts take.
    """

    def __init__(self, context: AgentContext, topic: str, mailbox: Mailbox, in_flight: InFlight) -> None:
        self.due = False
        """Whether there is news, so that it does not wait for its turn."""
        self._context = context
        self._topic = topic
        self._mailbox = mailbox
        self._in_flight = in_flight
        self._exporter = DeviceExporter(context.metrics)
        self._next_s = 0.0
        self._told: Telemetry | None = None  # what may be news, as the trainer knows it
        self._rests_until_s = 0.0
        self._said = ("", False)  # and whether it was a warning
        self._said_s = 0.0

    def is_due(self, now: float) -> bool:
        """Whether it is time."""
        return self.due or now >= self._next_s

    def take(
        self,
        now: float,
        in_use: InUse | None,
        *,
        source_ended: bool,
        trouble: str = "",
        final_only: bool = False,
        assignment: int = 0,
        qos: int = 0,
    ) -> LastWord | None:
        """The figures now; they are shown in the metrics and, now and then, in the log.

        Args:
            now: By the clock.
            in_use: The version in use.
            source_ended: Whether the data has ended, and all of it is computed.
            trouble: In words, what keeps the device from working.
            final_only: It listens for finished versions only.
            assignment: The version of what was assigned to it.
            qos: Of the message.

        Returns:
            What to report; nothing where the trainer knows it all, and has heard so not long ago.
        """
        context, forced, self.due = self._context, self.due, False
        for name, amount in self._mailbox.counts().items():
            context.outbox.count(name, amount)
        telemetry = msgspec.structs.replace(
            take_telemetry(context.outbox, in_use, source_ended=source_ended),
            unix_s=time.time(),
            receipt_s=self._in_flight.receipt_s,
            reconnects=int(total(context.metrics.reconnects)),
            trouble=trouble[:500],
            final_only=final_only,
            assignment=assignment,
            sending_seconds=self._in_flight.sending_s,
            memory_free_bytes=free_memory_bytes(),
        )
        measures = in_use.score.measures if in_use is not None and in_use.score is not None else {}
        self._exporter.update(telemetry, measures)
        self._log(telemetry, measures)
        payload = pack(telemetry)
        least_s = context.budget.seconds_of(len(payload)) / _LINK_SHARE if context.budget is not None else 0.0
        self._next_s = now + max(context.config.telemetry_every_s, least_s)
        if not self._tells(telemetry, now, forced=forced):
            return None
        return LastWord(self._topic, payload, qos, False)

    def _tells(self, telemetry: Telemetry, now: float, *, forced: bool) -> bool:
        """Whether these figures are reported: news, or the rest is over."""
        every_s, told = self._context.config.telemetry_every_s, msgspec.structs.replace(telemetry, **_NO_NEWS)
        news = forced or told != self._told
        if not news and now < self._rests_until_s:
            return False
        self._told = told
        # News is repeated soon, for a report may be lost on its way.
        rests_s = every_s if news else min(_REST * every_s, max(every_s, _REST_S))
        self._rests_until_s = now + rests_s
        return True

    def tell_anew(self) -> None:
        """Another trainer listens, or the same one again: it knows nothing yet, and hears all in its turn."""
        self._told = None

    def _log(self, telemetry: Telemetry, measures: Mapping[str, float]) -> None:
        line, now = progress_line(telemetry, measures), time.monotonic()
        unused = telemetry.finished and account(telemetry).unused > 0
        news = (line, unused) != self._said and (telemetry.samples_read or telemetry.weights_version)
        if news and (now - self._said_s > _PROGRESS_S or telemetry.finished):
            log.log(logging.WARNING if unused else logging.INFO, "%s", line)
            self._said, self._said_s = (line, unused), now


def take_telemetry(outbox: Outbox, in_use: InUse | None, *, source_ended: bool) -> Telemetry:
    """The device's figures now."""
    batches, size = outbox.size()
    rss, peak_rss = memory_bytes()
    with outbox.unlabelled() as store:
        waiting = store.waiting()
    score = in_use.score if in_use is not None else None
    told = Telemetry(
        stream=outbox.stream,
        outbox_batches=batches,
        outbox_bytes=size,
        outbox_max_bytes=outbox.max_bytes,
        rss_bytes=rss,
        peak_rss_bytes=peak_rss,
        temperature_celsius=temperature_celsius(),
        weights_version=in_use.version if in_use is not None else 0,
        weights_run=in_use.run if in_use is not None else "",
        accuracy=score.measures.get("accuracy") if score is not None else None,
        tally=score.tally if score is not None else None,
        probe_accuracy=score.probe if score is not None else None,
        evaluation_samples=score.samples if score is not None else 0,
        finished=source_ended and batches == 0,
        unlabelled_waiting=waiting,
    )
    return msgspec.structs.replace(told, **outbox.counters())


def progress_line(telemetry: Telemetry, measures: Mapping[str, float]) -> str:
    """The same for people.

    Args:
        telemetry: The figures.
        measures: The quality of the version in use, by name.
    """
    lost = f", {telemetry.samples_dropped} DROPPED by the full outbox" if telemetry.samples_dropped else ""
    lost += f", {telemetry.samples_lost} LOST with the trainer's journal" if telemetry.samples_lost else ""
    quality = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in measures.items())
    return (
        f"{account(telemetry)}{lost}; {telemetry.outbox_batches} batches in the outbox; "
        f"weights version {telemetry.weights_version}{quality}"
    )
