"""What one link has sent and the broker has not acknowledged: how much, how large, and whether it moves."""

import socket
import sys

from broker_config.connection.link_plan import LinkPlan, unsent_bytes
from broker_config.connection.packet_limit import Sizes
from broker_config.connection.window import InFlightWindow
from broker_config.errors import TooLarge

_PING_BYTES = 256  # that a ping came and went says nothing of messages


class Outgoing:
    """Safe between threads.

    Args:
        plan: What links have in common.
        most_bytes: The largest packet that the broker was found to take, if it cut the line at larger ones.
    """

    def __init__(self, plan: LinkPlan, most_bytes: int | None) -> None:
        self.window = InFlightWindow(plan.max_inflight, clock=plan.clock)
        """Places for messages."""
        self.sizes = Sizes()
        """Of what was sent."""
        self.max_packet_bytes = min(plan.settings.max_packet_bytes, most_bytes or sys.maxsize)
        """The largest packet to send."""
        self._plan = plan
        self._unsent_bytes = 0

    def limit(self, receive_maximum: int, max_packet_bytes: int | None) -> None:
        """The broker has said what it takes; nothing has been sent yet."""
        self.max_packet_bytes = min(self.max_packet_bytes, max_packet_bytes or sys.maxsize)
        self.window = InFlightWindow(min(self._plan.max_inflight, receive_maximum), clock=self._plan.clock)

    def acquire(self, size: int, counted: int, timeout_s: float) -> None:
        """Take a place for a packet of ``size`` bytes, of which ``counted`` show something once sent.

        Raises:
            TooLarge: no link to this broker carries it.
            NotConnected: the connection broke meanwhile.
            PublishTimeout: there was no place.
        """
        if size > self.max_packet_bytes:
            raise TooLarge(size, self.max_packet_bytes)
        self.window.acquire(timeout_s)
        self.sizes.handed(counted)

    def acknowledged(self, mid: int) -> None:
        """The broker has a packet."""
        self.window.release()
        self.sizes.acknowledged(mid)

    def stuck(self, sock: socket.socket | None) -> bool:
        """Whether nothing has moved for too long.

        A broker that forgot an acknowledgement, or never got a message, would hold it for ever.
        """
        unsent = unsent_bytes(sock)
        before, self._unsent_bytes = self._unsent_bytes, unsent
        if unsent != before and max(unsent, before) > _PING_BYTES:  # a slow line is no stuck one
            self.window.moved()
        return self.window.stuck_s > self._plan.stuck_s
