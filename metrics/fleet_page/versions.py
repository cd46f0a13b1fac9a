"""Since when there have been which versions of the weights, as far as this process saw them. Pure."""

from __future__ import annotations

from collections import deque
from typing import Final

_KNOWN: Final = 4096


class VersionTimes:
    """Times are on any clock that only rises, in seconds."""

    def __init__(self) -> None:
        self._since: deque[tuple[int, float]] = deque(maxlen=_KNOWN)

    def note(self, version: int, now: float) -> None:
        """``version`` is the newest."""
        if not self._since or version > self._since[-1][0]:
            self._since.append((version, now))

    def outdated_s(self, version: int | None, now: float) -> float:
        """For how long there has been a version after this one; 0 for None."""
        if version is None or not self._since or version >= self._since[-1][0]:
            return 0.0
        return next((now - since for newer, since in self._since if newer > version), 0.0)
