"""A new settings file on disk, from flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sidestream.contract.errors import ConfigError, StateError
from sidestream.host.settings_text import settings_file
from sidestream.host.state_dir import write_atomically
from sidestream.host.toml import load_config


def write_settings(
    kind: type[msgspec.Struct], path: Path, overrides: Mapping[str, Any], head: str, *, replace: bool
) -> None:
    """Write a commented settings file.

    Args:
        kind: The struct.
        path: The file.
        overrides: What is set in it, by dotted name, as flags give it.
        head: Its first lines.
        replace: Take the place of a file that is there.

    Raises:
        ConfigError: a setting is wrong or missing, or the file is there already.
        StateError: it cannot be written.
    """
    config = load_config(kind, None, overrides)
    if path.exists() and not replace:
        raise ConfigError(str(path), "is there already; --replace puts a new one in its place")
    values = {name: _value(config, name) for name in overrides}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, settings_file(kind, values, head).encode())
    except OSError as exc:
        raise StateError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
