"""The device's own status topic: what is said there, whether it comes back, and who else speaks there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from broker_config.connection.tls import certificate_expires_unix_s
from broker_config.transport import LastWord, Will
from edge_agent.batches.targets import names_in
from edge_agent.context import AgentContext
from edge_agent.samples.source import SampleSource
from edge_agent.session.duplicate_device import ranks_above
from edge_agent.session.outcome import Outcome
from edge_agent.session.write_check import WriteCheck
from edge_agent.uplink.link_state import LinkState
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.memory import free_memory_bytes
from sidestream.contract.messages import Status
from sidestream.contract.plan import Plan
from sidestream.contract.wire import pack, unpack
from sidestream.version import version


class OwnStatus:
    """Writes births and deaths; who holds it sends them.

    Args:
        context: Whose status it is.
        topic: Where it stands.
        source: Whose labels it tells.
        link: Says how often the broker has come.
    """

    def __init__(self, context: AgentContext, topic: str, source: SampleSource, link: LinkState) -> None:
        self.topic = topic
        """Where it stands."""
        self.due = False
        """Whether a birth is to be said: there is something new to tell, or somebody else has spoken."""
        self.writes = WriteCheck(context.name, context.tier, context.metrics)
        """Whether what is said comes back."""
        self.labels: Sequence[str] = ()
        """Label names in the device's data, as far as they can be listed."""
        self.backbone: Backbone | None = None
        """Once it is loaded; told from then on."""
        self._context = context
        self._source = source
        self._link = link
        self._birth = context.outbox.new_birth()
        self._looked_s = float("-inf")
        self._certificate_expires_unix_s = certificate_expires_unix_s(context.config.broker)

    def will(self) -> Will:
        """What the broker says if we are lost."""
        return Will(topic=self.topic, payload=pack(self._status("offline", "lost")))

    def birth(self) -> LastWord:
        """That we are here, and with which backbone."""
        return LastWord(self.topic, pack(self._status("online")), 1, True)

    def death(self, reason: str) -> LastWord:
        """That we leave."""
        return LastWord(self.topic, pack(self._status("offline", reason)), 1, True)

    def tell_backbone(self, backbone: Backbone) -> None:
        """It is loaded."""
        self.backbone, self.due = backbone, True

    def offer_labels(self, plan: Plan, now: float) -> None:
        """Tell the trainer which label names there are, as long as it looks for some."""
        if not plan.lacks_labels or now - self._looked_s < self._context.config.data.poll_s:
            return
        self._looked_s = now
        labels = self._source.labels(partial(names_in, plan.task))
        if labels != self.labels:
            self.labels, self.due = labels, True

    def hear(self, payload: bytes, *, retained: bool) -> Outcome | None:
        """What stands there is ours, an earlier life's, or another agent's under the same name.

        Raises:
            DecodeError: it is no status.
        """
        status, instance = unpack(Status, payload), self._context.instance
        if (status.instance, status.birth) == (instance, self._birth):
            if not retained:
                self.writes.heard()
        elif (
            status.instance != instance
            and ranks_above(status, birth=self._birth, instance=instance)
            and self._is_there(status, retained)
        ):
            return Outcome.DUPLICATE
        elif not retained:  # what stands there now is not ours: the other is to hear that we are here
            self.due = True
        elif status.birth > self._birth:
            # Of a life that this outbox, set back to an earlier state, knows nothing of.
            self._birth = self._context.outbox.new_birth(above=status.birth)
            return Outcome.SET_BACK
        return None

    def _is_there(self, status: Status, retained: bool) -> bool:
        """Whether it is no earlier life's."""
        return self._link.connections > 1 or (not retained and status.state == "online")

    def _status(self, state: Literal["online", "offline"], reason: str = "") -> Status:
        backbone, outbox = self.backbone, self._context.outbox
        return Status(
            state=state,
            birth=self._birth,
            stream=outbox.stream,
            software=version(),
            backbone=backbone.name if backbone else "",
            fingerprint=backbone.fingerprint if backbone else "",
            depth=backbone.depth if backbone else 0,
            width=backbone.width if backbone else 0,
            labels=tuple(self.labels) if state == "online" else (),
            reason=reason,
            instance=self._context.instance,
            kept_streams=outbox.streams.earlier(),
            memory_bytes=free_memory_bytes(),
            certificate_expires_unix_s=self._certificate_expires_unix_s,
        )
