"""Curves over a whole run in bounded memory: the longer it gets, the further apart its points. Pure."""

from __future__ import annotations

from typing import Final

from metrics.fleet_page.view import Point

MAX_POINTS: Final = 600


class History:
    """Points at even distances, from the first to now.

    Args:
        every_s: The least distance at first; it doubles whenever ``most`` points are there.
        most: How many points to keep; an even number.
    """

    def __init__(self, *, every_s: float = 1.0, most: int = MAX_POINTS) -> None:
        assert most % 2 == 0 and most > 0
        self.points: list[Point] = []
        """Oldest first."""
        self.thinned_at: int = 0
        """The revision at which points were last taken out."""
        self._every_s = every_s
        self._most = most

    def add(self, point: Point) -> None:
        """Append a point, unless it is too close to the last one."""
        if self.points and point.at_unix_s < self.points[-1].at_unix_s + self._every_s - 0.1:
            if point.at_unix_s < self.points[-1].at_unix_s:  # the clock was put back: begin anew
                self.points, self.thinned_at = [point], point.revision
            return
        self.points.append(point)
        if len(self.points) >= self._most:
            self.points = self.points[1::2]  # the newest stays
            self._every_s *= 2
            self.thinned_at = point.revision
