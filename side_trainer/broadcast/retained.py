"""What the trainer keeps on the broker, and how it notices that somebody else wrote there.

The trainer hears its own retained topics. A plan or weights that it did not publish would stop every device
that starts from then on, so it puts its own back.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from typing import Final

_REMEMBERED: Final = 8


class Retained:
    """The last payloads published on each retained topic, as digests. Safe to use from several threads."""

    def __init__(self) -> None:
        self._ours: dict[str, deque[bytes]] = {}
        self._lock = threading.Lock()

    def publishing(self, topic: str, payload: bytes) -> None:
        """Note a payload, before it is published; an empty one takes the topic back."""
        with self._lock:
            if payload:
                self._ours.setdefault(topic, deque(maxlen=_REMEMBERED)).append(_digest(payload))
            else:
                self._ours.pop(topic, None)

    def is_foreign(self, topic: str, payload: bytes) -> bool:
        """Whether a payload seen on one of our topics is none of the last that we published there."""
        with self._lock:
            return topic in self._ours and _digest(payload) not in self._ours[topic]


def _digest(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()
