"""What is known of the way to the trainer: written by the session's thread, which others may wake."""

from __future__ import annotations

from collections.abc import Callable

from sidestream.contract.messages import Flow
from sidestream.contract.plan import FlowPlan
from sidestream.contract.wire import TARGET_MESSAGE_BYTES

_MESSAGE_ROOM_BYTES = 512  # what MQTT adds to a message, at most


class LinkState:
    """See the module.

    Args:
        wake: Wakes the session's thread, from any other.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.connected = False
        """Whether the broker is there."""
        self.connections = 0
        """How often it has come."""
        self.max_packet_bytes = 0
        """What it takes."""
        self.trainer_online = False
        """Whether the trainer says that it is there."""
        self.trainer_fence = -1
        """Of the trainer that said last that it is there, or was said to have gone."""
        self.flow: Flow | None = None
        """How fast it lets this tier send; None before there is a plan."""
        self.retry_s = 0.0
        """What is not receipted for so long is sent again."""
        self.waits = False
        """The trainer has no room for what this device sends."""
        self.breaks = 0
        """Rises whenever batches that are under way are to be sent again."""
        self.news = True
        """Whether there may be something to send that was not there when it was last looked for."""
        self._wake = wake

    @property
    def max_message_bytes(self) -> int:
        """No batch is to be larger."""
        return min(TARGET_MESSAGE_BYTES, self.max_packet_bytes - _MESSAGE_ROOM_BYTES)

    @property
    def begun(self) -> bool:
        """Whether a plan says how often to send again. Its flow may have come alone, kept by the broker."""
        return self.flow is not None and self.retry_s > 0

    def begin(self, plan: FlowPlan) -> None:
        """What the plan says of flow is in force, unless the trainer has said something since."""
        self.retry_s = plan.retry_s
        self.set_flow(self.flow or Flow(window=plan.window))

    def set_flow(self, flow: Flow) -> None:
        """The trainer changed the rate."""
        self.flow = flow
        self.news = True

    def connection(self, up: bool) -> None:
        """The connection came up or went down; what was under way before may be lost."""
        self.connected = up
        self.connections += up
        self.send_again()

    def set_waits(self, waits: bool) -> None:
        """The trainer has no room for what this device sends, or has some again."""
        if waits != self.waits:
            self.waits = waits
            self.send_again()

    def send_again(self) -> None:
        """Repeat what is under way, with today's floor."""
        self.breaks += 1
        self.news = True

    def wake(self) -> None:
        """There is a new batch; from any thread."""
        self.news = True
        self._wake()
