"""Logging of a process: one line an event, to standard error. Never a payload, a text or a secret."""

from __future__ import annotations

import logging
import sys
import warnings


def set_up(level: str) -> None:
    """Log at ``level`` and above with time, level and the room that speaks; third parties from warning up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for room in ("sidestream", "edge_agent", "side_trainer", "broker_config", "metrics", "host", "contract"):
        logging.getLogger(room).setLevel(level.upper())
    warnings.simplefilter("ignore")
