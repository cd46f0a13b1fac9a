"""``install`` and ``uninstall``: how a room's process becomes a systemd service."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sidestream.host.commands import Handler, add_command
from sidestream.service.systemd import Service

_UNINSTALL = "Stop the service and take it away. Settings and state stay."


def add_install(commands: Any, part: str, handler: Handler, about: str) -> argparse.ArgumentParser:
    """Add ``install``, with the flags that all services have, and ``uninstall``.

    Args:
        commands: Where to.
        part: ``agent``, ``trainer`` or ``broker``.
        handler: Installs it.
        about: What that does, at length.
    """
    parser = add_command(commands, "install", handler, f"have systemd run the {part}", about)
    parser.add_argument("--run-as", metavar="NAME", default="", help="the user that it runs as")
    text = f"its state directory (default: that of the {part} run by hand)"
    parser.add_argument("--state-dir", metavar="DIR", type=Path, help=text)
    parser.add_argument("--dry-run", action="store_true", help="show the unit, and write nothing")
    text = "stop the service and take it away; settings and state stay"
    uninstalls = add_command(commands, "uninstall", _uninstall, text, _UNINSTALL)
    uninstalls.set_defaults(part=part)
    for one in (parser, uninstalls):
        one.add_argument("--user", action="store_true", help="a service of this user, not of the machine")
        one.add_argument(
            "--root",
            metavar="DIR",
            type=Path,
            default=Path("/"),
            help="root folder of another machine, such as an SD card mounted here; nothing is started",
        )
    return parser


def put_in_place(service: Service, *, dry_run: bool) -> int:
    """Write the unit and start it, or show it."""
    if dry_run:
        print(f"# {service.path}\n{service.text()}", end="")
        return 0
    if not service.for_user and service.user == "root":
        print(
            f"note: the settings belong to root, so the {service.part} runs as root; --run-as NAME, or chown "
            "them",
            file=sys.stderr,
        )
    for line in service.install():
        print(line)
    return 0


def _uninstall(args: argparse.Namespace) -> int:
    service = Service(
        part=args.part, words=(), settings=Path(), state=Path(), for_user=args.user, root=args.root
    )
    for line in service.uninstall():
        print(line)
    return 0
