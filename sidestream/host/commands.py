"""How a room adds its commands to the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias

Handler: TypeAlias = Callable[[argparse.Namespace], int]
"""Does what a command is for, and returns the exit code."""


# argparse does not export the type of what add_subparsers() returns.
def add_group(commands: Any, name: str, text: str, about: str, *, title: str = "command") -> Any:
    """Add ``name``, which is followed by a command of its own; return what those are added to.

    Args:
        commands: What to add it to.
        name: Its name.
        text: What it is for, in a line.
        about: The same at length; shown as it is laid out where it has lines.
        title: What it is followed by.
    """
    parser = _add(commands, name, text, about)
    return parser.add_subparsers(title=f"{title}s", metavar=title.upper(), required=True)


def add_command(
    commands: Any, name: str, handler: Handler, text: str, about: str = ""
) -> argparse.ArgumentParser:
    """Add a command, as :func:`add_group` does; its handler arrives as ``args.handler``."""
    parser = _add(commands, name, text, about or f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(handler=handler)
    return parser


def _add(commands: Any, name: str, text: str, about: str) -> argparse.ArgumentParser:
    shown = argparse.RawDescriptionHelpFormatter if "\n" in about else argparse.HelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=about, formatter_class=shown
    )
    return parser
