"""``sidestream top``: its arguments. What draws is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

import msgspec

from broker_config.settings import BrokerSettings
from sidestream.contract.errors import ConfigError
from sidestream.contract.topics import check_name
from sidestream.contract.wire import prepared
from sidestream.host.commands import add_command
from sidestream.host.flags import add_flags, overrides
from sidestream.host.logs import set_up
from sidestream.host.signals import stop_event
from sidestream.host.toml import load_config

_HELP: Final = """\
The fleet in a terminal: tiers, devices, accuracy, loss, throughput, and what was refused. It asks the
trainer's fleet page, so it works over ssh on the trainer's machine as it is:

  sidestream top                                        the trainer on this machine
  sidestream top --url http://192.168.1.11:9465/        another one, where page_host lets you
  sidestream top --broker mqtt://192.168.1.10:1883 --job commands
                                                        past the trainer, from what is on the broker
  sidestream top --once                                 print it and leave; --json for a program

Keys: q leaves, s sorts, arrows and PgUp/PgDn scroll.
"""


@prepared
class TopSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to look."""

    url: str = "http://127.0.0.1:9465/"
    """The trainer's fleet page."""
    job: str = ""
    """Look at the broker instead, at this job."""
    broker: BrokerSettings = BrokerSettings()
    """Where the broker is."""


def add_parser(subparsers: Any) -> None:
    """Add ``top``; the handler arrives as ``args.handler``."""
    parser = add_command(subparsers, "top", run, "watch the fleet in a terminal", _HELP)
    parser.add_argument("--once", action="store_true", help="print the fleet once and leave")
    parser.add_argument("--json", action="store_true", help="with --once: as JSON")
    secret = ("broker.username", "broker.password")
    add_flags(parser, TopSettings, short={"broker.url": "--broker"}, hidden=secret)


def run(args: argparse.Namespace) -> int:
    """Show the fleet."""
    given = overrides(args)
    settings = load_config(TopSettings, None, given)
    if args.json and not args.once:
        raise ConfigError("--json", "goes with --once")
    if settings.job:
        check_name("--job", settings.job)
    elif any(name.startswith("broker.") for name in given):
        raise ConfigError("--job", "is needed with --broker: the job to look at, as in trainer.toml")
    set_up("error")
    from rich.console import Console

    from sidestream.top.screen import screen
    from sidestream.top.source import BrokerSource, PageSource, PictureSource
    from sidestream.top.top import Top

    source: PictureSource = (
        BrokerSource(settings.broker, settings.job) if settings.job else PageSource(settings.url)
    )
    # On a pipe there is no width to keep to, and no colour unless asked for.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    try:
        with stop_event() as stop:
            top = Top(source, stop, console)
            if args.once and args.json:
                print(msgspec.json.encode(top.once().view).decode())
            elif args.once:
                console.print(screen(top.once(), width=console.width))
            elif not sys.stdout.isatty():
                raise ConfigError("top", "needs a terminal; print the fleet once with --once")
            else:
                top.run()
    finally:
        source.close()
    return 0
