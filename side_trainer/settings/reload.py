"""Settings that a running trainer takes up without a restart: new tiers, and how often things happen.

Everything else decides what a device has to do or what weights a journal gives, and waits for a restart.
Knows no broker and no journal.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from side_trainer.settings.implied import with_implied
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import ConfigError
from sidestream.host.toml import load_config

_log = logging.getLogger(__name__)
CADENCES: Final = (
    *("publish_every_s", "publish_change", "publish_share", "publish_gain", "max_down_mib_s"),
    *("checkpoint_every_s", "idle_after_s", "max_backlog"),
)
"""Settings that may change while the trainer runs, besides new tiers."""
_POLL_S: Final = 2.0


class SettingsFile:
    """The file that the trainer was started from, and the flags that override it.

    Args:
        path: The file.
        overrides: By dotted name.
    """

    def __init__(self, path: Path, overrides: Mapping[str, Any] | None = None) -> None:
        self.finish: Callable[[TrainerConfig], TrainerConfig] = lambda config: config
        """What this process makes of them: the settings of its own cell."""
        self.asked = threading.Event()
        """Set it, from a signal handler for one, to have the file read again though it looks the same."""
        self._path = path
        self._overrides = dict(overrides or {})
        self._stamp: tuple[int, ...] | None = None
        self._looked_s = 0.0

    def load(self) -> TrainerConfig:
        """Read the file.

        Raises:
            ConfigError: if it cannot be used.
        """
        self._stamp = self._now()
        config = load_config(TrainerConfig, self._path, self._overrides, complete=with_implied)
        return self.finish(config.checked())

    def update(self, running: TrainerConfig, now: float) -> TrainerConfig:
        """What to run with from now on: ``running``, or that with what the file has changed.

        Looks at the file every two seconds. A file that cannot be used changes nothing; that, and what would
        take a restart, is logged once.
        """
        if not self._is_due(now):
            return running
        try:
            updated, refused = take_up(running, self.load())
        except ConfigError as exc:
            _log.error("%s has changed, but cannot be used and is ignored: %s", self._path, exc)
            return running
        if refused:
            _log.error("%s: %s changed, which takes a restart; ignored", self._path, ", ".join(refused))
        for name in updated.tiers.keys() - running.tiers.keys():
            _log.info("tier %s is added", name)
        return updated

    def _is_due(self, now: float) -> bool:
        if self.asked.is_set():
            self.asked.clear()
            return True
        if now - self._looked_s < _POLL_S:
            return False
        self._looked_s = now
        return self._now() != self._stamp

    def _now(self) -> tuple[int, ...] | None:
        """What changes when the file does; None while there is none."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def take_up(running: TrainerConfig, fresh: TrainerConfig) -> tuple[TrainerConfig, list[str]]:
    """The running settings with what may change of the fresh ones, and the names of what may not.

    Raises:
        ConfigError: if a new tier does not go with the settings in force.
    """
    added = {name: tier for name, tier in fresh.tiers.items() if name not in running.tiers}
    changes: dict[str, Any] = {name: getattr(fresh, name) for name in CADENCES}
    updated = msgspec.structs.replace(running, tiers={**running.tiers, **added}, **changes).checked()
    return updated, list(_differences(msgspec.to_builtins(updated), msgspec.to_builtins(fresh)))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names, never values: there are secrets among those."""
    for name in sorted({**old, **new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}"
