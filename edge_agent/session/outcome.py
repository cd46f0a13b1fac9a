"""Why a session ended."""

from __future__ import annotations

import enum


class Outcome(enum.Enum):
    """Of several, the one that stands first counts."""

    STOPPED = "stopped"
    DUPLICATE = "another agent has this device's name"
    NEW_PLAN = "new plan"
    SET_BACK = "its state was set back, or copied"
    DONE = "done"
