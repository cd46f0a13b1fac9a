"""The link to the broker: whether it is up, what it takes, and whether this trainer may publish on it."""

from __future__ import annotations

import sys
import threading

from broker_config.errors import NotConnected
from broker_config.transport import Transport
from side_trainer.broadcast.leader_election import LeaderElection


class LeaderTransport:
    """Publishes while ``election`` allows it; everybody asks here what the link is like.

    Args:
        transport: Where to.
        election: Says whether.
    """

    def __init__(self, transport: Transport, election: LeaderElection) -> None:
        self._transport = transport
        self._election = election
        self.max_packet_bytes = sys.maxsize
        """What the present connection takes, as the last event ``Connected`` said."""
        self.confirmed = threading.Event()
        """Set once it was certain, on some connection, that this is the job's one trainer."""

    @property
    def connected(self) -> bool:
        """See :class:`~broker_config.transport.Transport`."""
        return self._transport.connected

    @property
    def leads(self) -> bool:
        """Whether this is certainly the job's one trainer."""
        return self._election.active

    @property
    def active(self) -> bool:
        """Whether a publish would be attempted right now."""
        return self.leads and self.connected

    @property
    def fence(self) -> int:
        """What this trainer's plans and receipts carry."""
        return self._election.fence

    def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        self._transport.subscribe(topic_filter, qos=qos)

    def unsubscribe(self, topic_filter: str) -> None:
        """See :class:`~broker_config.transport.Transport`."""
        self._transport.unsubscribe(topic_filter)

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout_s: float = 10.0
    ) -> None:
        """See :class:`~broker_config.transport.Transport`.

        Raises:
            NotConnected: also where another trainer may be the job's.
        """
        if not self.leads:
            raise NotConnected("it is not certain yet that this is the job's only trainer")
        self._transport.publish(topic, payload, qos=qos, retain=retain, timeout_s=timeout_s)

    def ask(self, topic: str, payload: bytes) -> None:
        """Publish a claim, which is how certainty is come by."""
        self._transport.publish(topic, payload)
