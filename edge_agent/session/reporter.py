"""What the device says of itself: births and deaths, telemetry, a progress line in its own log."""

from __future__ import annotations

import logging
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from broker_config.transport import LastWord, Will
from edge_agent.session.duplicate_device import ranks_above
from edge_agent.session.telemetry import progress_line, take_telemetry
from edge_agent.store.outbox import Outbox
from edge_agent.weights.adoption import InUse
from metrics.catalogue import AgentMetrics
from metrics.telemetry import DeviceExporter
from sidestream.backbone.backbone import Backbone
from sidestream.contract.messages import Status
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack

_PROGRESS_S = 10.0
log = logging.getLogger(__name__)


class Reporter:
    """Writes the device's messages; who holds it sends them.

    Args:
        outbox: Where the counters are.
        topics: The job's.
        tier: The device's tier,
        name: and its name.
        instance: The process's random name.
        metrics: Shows the same figures.
    """

    def __init__(
        self,
        outbox: Outbox,
        topics: Topics,
        *,
        tier: str,
        name: str,
        instance: str,
        metrics: AgentMetrics,
    ) -> None:
        self.backbone: Backbone | None = None
        """Once it is loaded."""
        self.labels: tuple[str, ...] = ()
        """Label names in the device's data, as far as they can be listed."""
        self._outbox = outbox
        self._instance = instance
        self._birth = outbox.new_birth()
        self._status_topic = topics.status(tier, name)
        self._telemetry_topic = topics.telemetry(tier, name)
        self._exporter = DeviceExporter(metrics)
        self._said = ""
        self._said_s = 0.0

    def will(self) -> Will:
        """What the broker says if we are lost."""
        return Will(topic=self._status_topic, payload=pack(self._status("offline", "lost")))

    def birth(self) -> LastWord:
        """That we are here, and with which backbone."""
        return LastWord(self._status_topic, pack(self._status("online")), 1, True)

    def death(self, reason: str) -> LastWord:
        """That we leave."""
        return LastWord(self._status_topic, pack(self._status("offline", reason)), 1, True)

    def telemetry(self, in_use: InUse | None, *, source_ended: bool, qos: int = 0) -> LastWord:
        """The figures now; they are shown in the metrics and, now and then, in the log."""
        telemetry = take_telemetry(self._outbox, in_use, source_ended=source_ended)
        measures = in_use.score.measures if in_use is not None and in_use.score is not None else {}
        self._exporter.update(telemetry, measures)
        line, now = progress_line(telemetry, measures), time.monotonic()
        news = line != self._said and (telemetry.samples_read or telemetry.weights_version)
        if news and (now - self._said_s > _PROGRESS_S or telemetry.finished):
            log.info("%s", line)
            self._said, self._said_s = line, now
        return LastWord(self._telemetry_topic, pack(telemetry), qos, False)

    def _status(self, state: Literal["online", "offline"], reason: str = "") -> Status:
        backbone = self.backbone
        return Status(
            state=state,
            birth=self._birth,
            stream=self._outbox.stream,
            software=_software(),
            backbone=backbone.name if backbone else "",
            fingerprint=backbone.fingerprint if backbone else "",
            depth=backbone.depth if backbone else 0,
            width=backbone.width if backbone else 0,
            labels=self.labels if state == "online" else (),
            reason=reason,
            instance=self._instance,
            kept_streams=self._outbox.earlier_streams,
        )

    def is_own(self, status: Status) -> bool:
        """Whether a status is one that this process said."""
        return status.instance == self._instance and status.birth == self._birth

    def counts_below(self, status: Status) -> bool:
        """Whether a status tells of more lives than this outbox has had."""
        return status.birth > self._birth

    def rise_above(self, status: Status) -> None:
        """Count on from the births of a life that this outbox, set back since, knows nothing of."""
        self._birth = self._outbox.new_birth(above=status.birth)

    def gives_way_to(self, status: Status) -> bool:
        """Whether a status on this device's topic is another agent's, to which this one gives way."""
        return status.instance != self._instance and ranks_above(
            status, birth=self._birth, instance=self._instance
        )


def _software() -> str:
    try:
        return version("sidestream")
    except PackageNotFoundError:
        return ""
