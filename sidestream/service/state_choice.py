"""Which state directory a command is about: given, or found by the job's name or a settings file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from sidestream.contract.errors import ConfigError
from sidestream.contract.topics import check_name
from sidestream.host.state_dir import default_dir
from sidestream.host.toml import read_table

_USUAL: Final[dict[str, tuple[str, ...]]] = {
    "agent": ("~/.config/sidestream/agent.toml", "/etc/sidestream/agent.toml"),
    "trainer": (),
}
"""Where enrolment puts settings."""


def add_state_dir(parser: argparse.ArgumentParser, whose: str) -> None:
    """Add ``--state-dir``, and what can be given in its place: ``--job`` or ``--config``."""
    parser.set_defaults(find_state_dir=whose)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--state-dir", metavar="DIR", type=Path, help=f"the {whose}'s state directory")
    which.add_argument("--job", metavar="NAME", default="", help=f"the job, whose {whose}'s own folder it is")
    text = f"the {whose}'s settings, which say where it is"
    which.add_argument("--config", metavar="FILE", type=Path, help=text)


def find_state_dir(args: argparse.Namespace) -> None:
    """Put the state directory in ``args.state_dir``, for a command that :func:`add_state_dir` was called on.

    Without any of the three it is that of the one job that there is on this machine.

    Raises:
        ConfigError: it cannot be told which it is.
    """
    whose = getattr(args, "find_state_dir", None)
    if whose is None or args.state_dir is not None or getattr(args, "cells", None) is not None:
        return
    if args.config is not None:
        args.state_dir = _named_by(args.config, whose)
    elif args.job:
        check_name("--job", args.job)
        args.state_dir = default_dir(whose, args.job)
    else:
        args.state_dir = _the_one(whose)


def _named_by(path: Path, whose: str) -> Path:
    settings: dict[str, Any] = read_table(path)
    given, job = settings.get("state_dir", ""), settings.get("job", "")
    if settings.get("cells"):
        raise ConfigError(
            "--config", f"{path} has [[cells]]: give one's folder, --state-dir STATE_DIR/cells/NAME"
        )
    if given:
        return Path(str(given)).expanduser()
    if not isinstance(job, str) or not job:
        raise ConfigError("--config", f"{path} names neither a state_dir nor a job")
    check_name("job", job)
    return default_dir(whose, job)


def _the_one(whose: str) -> Path:
    for name in _USUAL[whose]:
        path = Path(name).expanduser()
        if path.is_file():
            return _named_by(path, whose)
    folder = default_dir(whose, "any").parent
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(found) == 1:
        return folder / found[0]
    there = f"jobs with one here: {', '.join(found)}" if found else f"there is none in {folder}"
    raise ConfigError("--state-dir", f"say which {whose}'s, by --state-dir, --job or --config; {there}")
