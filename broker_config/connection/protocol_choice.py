"""MQTT 5 where the broker speaks it, 3.1.1 where it does not. Pure: a small state machine, no sockets."""

from typing import Literal

from broker_config.transport import ProtocolVersion


class ProtocolChoice:
    """Which MQTT version to speak next.

    Args:
        wanted: A fixed version, or ``auto``: 5 first, and 3.1.1 for good once the broker says it does not
            speak 5. A broker that says nothing at all is offered the two in turn.
    """

    def __init__(self, wanted: Literal["auto", "5", "3.1.1"]) -> None:
        self._fixed: ProtocolVersion | None = None if wanted == "auto" else wanted
        self._next: ProtocolVersion = "5"
        self._stay = False

    @property
    def current(self) -> ProtocolVersion:
        """What the next connection speaks."""
        return self._fixed or self._next

    def unsupported(self) -> bool:
        """The broker said it does not speak this version; whether there is another to try."""
        if self._fixed is not None:
            return False
        self._fixed = "3.1.1"
        return True

    def silence(self, *, lasting: bool) -> None:
        """The broker said nothing: it hung up at once, or (``lasting``) kept us waiting until we gave up.

        A hang-up costs little to hear again, and a broker that is just going down hangs up too: after the
        next success, 5 is tried again. A wait is long, so then we stay with what worked.
        """
        self._next = "3.1.1" if self._next == "5" else "5"
        self._stay = lasting

    def worked(self) -> None:
        """The broker let us in."""
        if not self._stay:
            self._next = "5"
