"""Whether the broker's access list lets this device write: it must hear its own status, and have receipts.

MQTT 5 says so when a message is refused; 3.1.1 acknowledges it like any other and throws it away. So an agent
subscribes to its own status, and what it says there has to come back. A list may allow that and not the
batches, or not the reading of receipts: then none is receipted though the trainer is online. (Telemetry that
does not arrive only the trainer can miss, and does.) Pure: the caller brings the clock.
"""

from __future__ import annotations

import logging
from typing import Final

from metrics.catalogue import AgentMetrics

PATIENCE_S: Final = 15.0
UNANSWERED_S: Final = 90.0
"""Batches that an online trainer has not receipted any of for so long are not arriving."""
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
        self._unanswered = False
        self.trouble = ""
        """In a few words, what is wrong; empty: nothing is."""

    def said(self, now: float) -> None:
        """The status was published."""
        if self._awaited_since_s is None:
            self._awaited_since_s = now

    def heard(self) -> None:
        """It came back."""
        self._awaited_since_s = None
        self._set("")

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
        self._set(f"the broker {how} what it writes: see its access list, and the device's name and tier")
        if now - self._told_s > _TELL_EVERY_S:
            self._told_s = now
            _log.error(
                "the broker %s what this device writes: its access list does not allow it to %s. Compare "
                "device and tier in the settings with those that the certificate or password was issued for "
                "(sidestream fleet list), and have the broker read its list again. Nothing is lost meanwhile",
                *(how, self._who),
            )

    def _set(self, trouble: str) -> None:
        self.trouble = trouble
        self._metrics.writes_denied.set(bool(trouble))

    def check_batches(self, now: float, unanswered_s: float) -> None:
        """Say so if batches are sent and never receipted.

        Args:
            now: By the clock.
            unanswered_s: For how long, while the trainer is online; 0 if receipts come, or nothing is sent.
        """
        before, self._unanswered = self._unanswered, unanswered_s > UNANSWERED_S
        if before and not self._unanswered:
            self._set("")
        if self._unanswered:
            self._set(
                "its batches are not receipted, though the trainer is online: see the broker's access list"
            )
        if self._unanswered and now - self._told_s > _TELL_EVERY_S:
            self._told_s = now
            _log.error(
                "no batch has been receipted for %.0f s, though the trainer is online: the broker's access "
                "list may not allow %s to write its activations, or to read its receipts. Compare device and "
                "tier with those that the list was written for (sidestream fleet list; sidestream doctor "
                "tries it), and have the broker read it again. Nothing is lost meanwhile",
                *(unanswered_s, self._who),
            )
