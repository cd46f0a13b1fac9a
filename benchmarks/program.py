"""What the benchmarks' programs share: how they begin, tell how it goes and end, and which rows they take."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias, TypeVar

from sidestream.contract.errors import SidestreamError
from sidestream.host.signals import INTERRUPTED

Tell: TypeAlias = Callable[[str], None]
"""Given lines of progress."""
_Parsed = TypeVar("_Parsed")


def run_program(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], str],
    arguments: Sequence[str] | None,
) -> int:
    """Print what ``run`` has to say, or in one line what is wrong; return the exit code."""
    args = parser.parse_args(arguments)
    try:
        print(run(args))
    except SidestreamError as exc:
        print(f"{parser.prog}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def teller() -> Tell:
    """Lines of progress on standard error, each with the seconds that have passed by then."""
    started = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    return tell


def argument_of(parse: Callable[[str], _Parsed]) -> Callable[[str], _Parsed]:
    """The type of an argument that ``parse`` reads; argparse shows what its ValueError says."""

    def parsed(text: str) -> _Parsed:
        try:
            return parse(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return parsed


def names_of(rows: Collection[str]) -> Callable[[str], list[str]]:
    """The type of an argument: some of ``rows``, with commas between them."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := sorted(set(found) - set(rows)):
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: no such row; there are {', '.join(rows)}"
            )
        return found

    return names
