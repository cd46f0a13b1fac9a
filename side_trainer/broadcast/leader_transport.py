"""A transport through which only the job's one trainer can publish."""

from __future__ import annotations

import sys

from broker_config.errors import NotConnected
from broker_config.transport import Transport
from side_trainer.broadcast.leader_election import LeaderElection


class LeaderTransport:
    """Publishes while ``election`` allows it.

    Args:
        transport: Where to.
        election: Says whether.
    """

    def __init__(self, transport: Transport, election: LeaderElection) -> None:
        self._transport = transport
        self._election = election
        self.max_packet_bytes = sys.maxsize
        """What the present connection takes, as the last event ``Connected`` said."""

    @property
    def connected(self) -> bool:
        """See :class:`~broker_config.transport.Transport`."""
        return self._transport.connected

    @property
    def active(self) -> bool:
        """Whether a publish would be attempted right now."""
        return self._election.active and self._transport.connected

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
        if not self._election.active:
            raise NotConnected("it is not certain yet that this is the job's only trainer")
        self._transport.publish(topic, payload, qos=qos, retain=retain, timeout_s=timeout_s)

    def ask(self, topic: str, payload: bytes) -> None:
        """Publish a claim, which is how certainty is come by."""
        self._transport.publish(topic, payload)
