"""What one link is subscribed to, and what it should be: only the difference is asked for."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from broker_config.topic_filter import Filters
from broker_config.transport import ProtocolVersion

log = logging.getLogger(__name__)

_FILTERS_A_PACKET = 8  # AWS IoT Core takes no more in one SUBSCRIBE


class LinkFilters:
    """Belongs to the network loop's thread, but for :attr:`out_of_step`.

    Args:
        wanted: Gives the filters to be subscribed to, and their QoS, whenever asked.
        protocol: The MQTT version that the link speaks.
        counters: Where refusals are counted.
    """

    def __init__(
        self, wanted: Callable[[], Mapping[str, int]], protocol: ProtocolVersion, counters: Counter[str]
    ) -> None:
        self.out_of_step = False
        """Whether the wanted filters may be others than those that the broker was asked for."""
        self.matching = Filters(())
        """Those that it was asked for."""
        self._wanted = wanted
        self._protocol: ProtocolVersion = protocol
        self._counters = counters
        self._granted: Mapping[str, int] = {}
        self._unanswered: dict[int, list[str]] = {}

    @property
    def settled(self) -> bool:
        """Whether the broker has answered everything."""
        return not self._unanswered

    def bring_into_step(self, client: Client) -> None:
        """Ask the broker for what is missing, and take back what is not wanted any more."""
        self.out_of_step = False
        wanted = dict(self._wanted())
        gone = [name for name in self._granted if name not in wanted]
        new = [name for name, qos in wanted.items() if self._granted.get(name) != qos]
        self._granted, self.matching = wanted, Filters(wanted)
        # New ones first: what an old and a new one match must not fall between them.
        for some in _slices(new):
            code, mid = client.subscribe([self._subscription(name, wanted[name]) for name in some])
            if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None:
                self._unanswered[mid] = some
        for some in _slices(gone):
            client.unsubscribe(some)

    def answered(self, mid: int, codes: list[ReasonCode]) -> None:
        """The broker has answered a SUBSCRIBE."""
        for topic_filter, code in zip(self._unanswered.pop(mid, []), codes, strict=False):
            if code.is_failure:
                self._counters["subscriptions_refused"] += 1
                log.warning("the broker refused the subscription to %s: %s", topic_filter, code)

    def _subscription(self, topic_filter: str, qos: int) -> Any:
        return (topic_filter, SubscribeOptions(qos=qos) if self._protocol == "5" else qos)


def _slices(names: list[str]) -> Iterator[list[str]]:
    return (names[start : start + _FILTERS_A_PACKET] for start in range(0, len(names), _FILTERS_A_PACKET))
