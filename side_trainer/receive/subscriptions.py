"""What the trainer listens to, and how it stops listening to one device without missing the others.

MQTT has no "all but one": where a device is to be left out, the filter for all of them is replaced by one for
each other device that is known. Whoever is new is heard of by its status, and added.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Final

from broker_config.transport import Transport
from metrics.broker_figures import BROKER_FIGURES
from metrics.catalogue import Kind
from sidestream.contract.topics import Topics

MOST_LISTED: Final = 2000
"""More devices than that are not subscribed to one by one."""


class Subscriptions:
    """Belongs to one thread once :meth:`begin` has returned.

    Args:
        transport: Where to subscribe.
        topics: The job's.
    """

    def __init__(self, transport: Transport, topics: Topics) -> None:
        self._transport = transport
        self._topics = topics
        self._held = {kind: {topics.uplink_filter(kind.value)} for kind in Kind}

    def begin(self) -> None:
        """Subscribe to everything."""
        for kind, filters in self._held.items():
            self._subscribe(kind, filters)
        topics = self._topics
        for topic_filter in (
            *(topics.trainer_status, topics.trainer_claim, topics.plan),
            *topics.all_weights_filters,
        ):
            self._transport.subscribe(topic_filter)
        for topic in BROKER_FIGURES:
            self._transport.subscribe(topic, qos=0)

    def leave_out(self, topics: AbstractSet[str], known: Iterable[tuple[str, str]]) -> None:
        """Listen to everybody but on these topics; to everybody, if there are none.

        Args:
            topics: Of devices.
            known: Tier and name of every device that is known.
        """
        devices = list(known) if topics else []
        for kind in Kind:
            out = {topic for topic in topics if topic.endswith(f"/{kind.value}")}
            if out and len(devices) <= MOST_LISTED:
                wanted = {self._topics.uplink(tier, name, kind.value) for tier, name in devices} - out
            else:
                wanted = {self._topics.uplink_filter(kind.value)}
            self._change(kind, wanted)

    def _change(self, kind: Kind, wanted: set[str]) -> None:
        before, self._held[kind] = self._held[kind], wanted
        self._subscribe(kind, wanted - before)
        for topic_filter in before - wanted:
            self._transport.unsubscribe(topic_filter)

    def _subscribe(self, kind: Kind, filters: AbstractSet[str]) -> None:
        for topic_filter in sorted(filters):
            self._transport.subscribe(topic_filter, qos=0 if kind is Kind.TELEMETRY else 1)
