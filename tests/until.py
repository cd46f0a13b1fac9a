"""How a test waits: for a condition, and long enough for a machine that does ten other things."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

PATIENCE_S: Final = 120.0


def until(condition: Callable[[], object], what: str = "it", timeout_s: float = PATIENCE_S) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: it has not come.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain: {what}"
        time.sleep(0.02)
