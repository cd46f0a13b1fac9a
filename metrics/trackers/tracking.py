"""Hands the curves of the fleet page to trackers, on a thread of its own: a slow one holds up nobody.

A tracker is ``NAME:WHERE``. Those that come with the product stand in :data:`OWN`; others are packages with
an entry point in the group ``sidestream.trackers``.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, TypeAlias

from metrics.fleet_page.view import Point
from sidestream.contract.errors import ConfigError

GROUP: Final = "sidestream.trackers"
OWN: Final = {
    "tensorboard": "metrics.trackers.tensorboard",
    "mlflow": "metrics.trackers.mlflow",
}
"""Modules with a function ``open_tracker(where, job)``."""
_WAITING: Final = 256
_CLOSE_S: Final = 20.0
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a tracker does."""

    def log(self, version: int, figures: Mapping[str, float]) -> None:
        """Take figures of a version, by name, such as ``accuracy/pi``, ``loss/pi`` and ``samples``."""

    def close(self) -> None:
        """Write what is not written yet."""


Factory: TypeAlias = Callable[[str, str], Tracker]
"""Opens a tracker at a place, for a job."""


def check_trackers(specs: Sequence[str]) -> None:
    """Raises ConfigError unless each is ``NAME:WHERE`` of a tracker that there is."""
    for spec in specs:
        _factory(spec)


def folders_of(specs: Sequence[str]) -> list[Path]:
    """Where our own trackers write on this machine.

    Raises:
        ConfigError: that depends on the folder that the trainer is started in.
    """
    found = []
    for spec in specs:
        name, _, where = spec.partition(":")
        if name not in OWN or "://" in where.removeprefix("file://"):
            continue
        folder = Path(where.removeprefix("file:").replace("///", "/", 1)).expanduser()
        if not folder.is_absolute():
            raise ConfigError("trackers", f"{spec!r} depends on where it is started; write a full path")
        found.append(folder)
    return found


def _factory(spec: str) -> tuple[Factory, str]:
    name, colon, where = spec.partition(":")
    if not colon or not where:
        raise ConfigError("trackers", f"{spec[:80]!r} is no NAME:WHERE, such as tensorboard:runs")
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name in OWN:
        factory: Factory = importlib.import_module(OWN[name]).open_tracker
        return factory, where
    if name not in found:
        known = ", ".join(sorted({*OWN, *found}))
        raise ConfigError("trackers", f"there is no tracker {name!r}; there are: {known}")
    try:
        factory = found[name].load()
    except Exception as exc:
        raise ConfigError("trackers", f"{name!r} cannot be loaded: {exc}") from exc
    return factory, where


def figures_of(point: Point, measure: str, version: int) -> dict[int, dict[str, float]]:
    """What a point of the curves says, by the version that it is of."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for tier, value in point.quality.items():
        if point.versions.get(tier):
            found[point.versions[tier]][f"{measure}/{tier}"] = value
    if version:
        found[version].update({f"loss/{tier}": value for tier, value in point.loss.items()})
        found[version].update(
            {
                "samples": point.samples,
                "messages": point.messages,
                "messages_refused": point.refused,
                "bytes_up": point.bytes_up,
                "bytes_down": point.bytes_down,
                "devices_online": point.online,
            }
        )
    return dict(found)


class Trackers:
    """Trackers that are open; close them, or use it as a context manager.

    Args:
        specs: ``NAME:WHERE`` each.
        job: The job's name.

    Raises:
        ConfigError: there is none of that name, it is not installed, or cannot write there.
    """

    def __init__(self, specs: Sequence[str], job: str) -> None:
        self._open: list[tuple[str, Tracker]] = []
        for spec in specs:
            factory, where = _factory(spec)
            self._open.append((spec, factory(where, job)))
        self._told: dict[int, dict[str, float]] = {}
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_WAITING)
        self._failed: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="trackers", daemon=True)
        if self._open:
            self._thread.start()

    def offer(self, point: Point, measure: str, version: int) -> None:
        """Take a point of the curves; what has not changed of a version is not told again. Never waits."""
        if not self._open:
            return
        for step, figures in figures_of(point, measure, version).items():
            known = self._told.get(step, {})
            news = {name: value for name, value in figures.items() if known.get(name) != value}
            if not news:
                continue
            try:
                self._queue.put_nowait((step, news))
            except queue.Full:
                continue  # it is told with the next point, if it is still so
            self._told[step] = {**known, **news}
        while len(self._told) > _WAITING:
            del self._told[next(iter(self._told))]

    def close(self) -> None:
        """Tell what waits, and close them; again does nothing."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            for spec, tracker in self._open:
                self._try(spec, partial(tracker.log, *item))
        for spec, tracker in self._open:
            self._try(spec, tracker.close)

    def _try(self, spec: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as exc:
            level = logging.DEBUG if spec in self._failed else logging.WARNING
            self._failed.add(spec)
            _log.log(level, "tracker %s: %s: %s; training goes on", spec, type(exc).__name__, exc)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
