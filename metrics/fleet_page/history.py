"""Curves over a whole run in bounded memory: the longer ago, the further apart its points. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from metrics.fleet_page.view import Point

MAX_POINTS: Final = 600
RECENT: Final = ((1.0, 300), (5.0, 300), (30.0, 300), (300.0, 300))
"""Beside the whole run: seconds apart, and how many; so five minutes, 25, two and a half hours, a day."""
_SLACK_S: Final = 0.1


class History:
    """Points at even distances, from the first to now; of the last day closer ones.

    Args:
        every_s: The least distance at first; it doubles whenever ``most`` points are there.
        most: How many points of the whole run to keep; an even number.
        recent: Seconds apart and how many, of what is kept beside them.
    """

    def __init__(
        self,
        *,
        every_s: float = 1.0,
        most: int = MAX_POINTS,
        recent: Sequence[tuple[float, int]] = RECENT,
    ) -> None:
        assert most % 2 == 0 and most > 0
        self.restarted_at: int = 0
        """The revision at which all points were last thrown away."""
        self._whole: list[Point] = []
        self._every_s = every_s
        self._most = most
        self._recent = [(apart_s, deque[Point](maxlen=count)) for apart_s, count in recent]

    @property
    def points(self) -> list[Point]:
        """All that are kept, the oldest first."""
        kept = {one.at_unix_s: one for one in self._whole}
        for _, some in self._recent:
            kept.update((one.at_unix_s, one) for one in some)
        return sorted(kept.values(), key=lambda one: one.at_unix_s)

    def add(self, point: Point) -> None:
        """Append a point, unless it is too close to the last one."""
        newest = self._whole[-1].at_unix_s if self._whole else point.at_unix_s
        if any(some and point.at_unix_s < some[-1].at_unix_s for some in (self._whole, *self._rings)):
            self._whole, self.restarted_at = [], point.revision  # the clock was put back: begin anew
            for ring in self._rings:
                ring.clear()
        for apart_s, ring in self._recent:
            if not ring or point.at_unix_s >= ring[-1].at_unix_s + apart_s - _SLACK_S:
                ring.append(point)
        if self._whole and point.at_unix_s < newest + self._every_s - _SLACK_S:
            return
        self._whole.append(point)
        if len(self._whole) >= self._most:
            self._whole = self._whole[1::2]  # the newest stays
            self._every_s *= 2

    @property
    def _rings(self) -> list[deque[Point]]:
        return [ring for _, ring in self._recent]
