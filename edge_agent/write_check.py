"""Whether the broker's access list lets this device write: it must hear its own status.

MQTT 5 says so when a message is refused; 3.1.1 acknowledges it like any other and throws it away. So an agent
subscribes to its own status, and what it says there has to come back. Pure: the caller brings the clock.
"""

from __future__ import annotations

import logging
from typing import Final

from metrics.catalogue import AgentMetrics

PATIENCE_S: Final = 15.0
_TELL_EVERY_S: Final = 600.0
_log = logging.getLogger(__name__)


class WriteCheck:
    """Belongs to one thread.

    Args:
        name: The device's,
        tier: and its tier's.
        metrics: Shows it.
    """

    def __init__(self, name: str, tier: str, metrics: AgentMetrics) -> None:
        self._who = f"device {name!r} of tier {tier!r}"
        self._metrics = metrics
        self._awaited_since_s: float | None = None
        self._refused = 0
        self._told_s = float("-inf")

    def said(self, now: float) -> None:
        """The status was published."""
        if self._awaited_since_s is None:
            self._awaited_since_s = now

    def heard(self) -> None:
        """It came back."""
        self._awaited_since_s = None
        self._metrics.writes_denied.set(0)

    def disconnected(self) -> None:
        """Nothing comes back from now on."""
        self._awaited_since_s = None

    def check(self, now: float, refused: int) -> None:
        """Say what is wrong, if anything is.

        Args:
            now: By the clock.
            refused: How many messages the broker has said that it refused.
        """
        lost = self._awaited_since_s is not None and now - self._awaited_since_s > PATIENCE_S
        if refused <= self._refused and not lost:
            return
        how = "refuses" if refused > self._refused else "acknowledges and throws away"
        self._refused = refused
        self._metrics.writes_denied.set(1)
        if now - self._told_s > _TELL_EVERY_S:
            self._told_s = now
            _log.error(
                "the broker %s what this device writes: its access list does not allow it to %s. Compare "
                "device and tier in the settings with those that the certificate or password was issued for "
                "(sidestream fleet list), and have the broker read its list again. Nothing is lost meanwhile",
                *(how, self._who),
            )
