"""``sidestream broker``: run the embedded broker, or write the configuration of one's own.

Handlers return an exit code and raise :class:`sidestream.contract.errors.SidestreamError` for what the user
can mend.
"""

import argparse
import socket
import sys
import threading
from pathlib import Path
from typing import Any, get_args

import msgspec

from broker_config.embedded.broker import EmbeddedBroker
from broker_config.mosquitto import render_deployment
from sidestream.host.commands import add_command, add_group
from sidestream.host.logs import LogFormat, say, set_up
from sidestream.host.signals import stop_event
from sidestream.host.state_dir import default_dir
from sidestream.service.install import add_install, put_in_place
from sidestream.service.systemd import Service, state_by_hand, system_state

_LOOK_S = 0.25  # how often a running broker is checked for having died

_RUN_HELP = """\
Run the embedded broker until Ctrl-C: Mosquitto if it is installed, else the built-in amqtt (MQTT 3.1.1).
It listens on this machine only. To serve devices on the network for a trial, use --host 0.0.0.0: there are
no passwords then. For a real fleet, run a broker of your own: see "sidestream broker render".
"""

_INSTALL_HELP = """\
Have systemd run the embedded broker, now and after every start of the machine, as a service with few rights:
as root, or better as --run-as says. For a real fleet, run Mosquitto's own service with the configuration that
"sidestream fleet init" or "sidestream broker render" writes.

    sudo sidestream broker install --run-as pi
"""
_RENDER_HELP = """\
Write mosquitto.conf for a broker of your own, with every setting explained: packet size, queue limits,
persistence, listeners. It starts as it is, for this machine only; the listener for the fleet is in it,
commented out, until there are certificates.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``broker`` with ``run`` and ``render``; the chosen handler arrives as ``args.handler``."""
    commands = add_group(
        subparsers,
        "broker",
        "run the embedded broker, or configure one of your own",
        "Run the embedded broker, or write the configuration of one of your own.",
    )
    _add_run(commands)
    _add_render(commands)
    _add_install(commands)


def run(args: argparse.Namespace) -> int:
    """Run the embedded broker until SIGINT or SIGTERM; it dying on its own is an error."""
    set_up(args.log_level, args.log_format)
    with stop_event() as stop:
        return _run_until(stop, args)


def render(args: argparse.Namespace) -> int:
    """Write mosquitto.conf and say where."""
    for path in render_deployment(Path(args.out)):
        print(f"wrote {path}")
    print(f"try it with: mosquitto -c {Path(args.out) / 'mosquitto.conf'}")
    return 0


def _run_until(stop: threading.Event, args: argparse.Namespace) -> int:
    data_dir = Path(args.data_dir)
    broker = EmbeddedBroker(host=args.host, port=args.port, data_dir=data_dir, kind=args.kind)
    say(f"broker: {broker.why}")
    with broker:
        say(f"listening: {broker.url}{_elsewhere(broker)} (pid {broker.pid}, data and log in {data_dir})")
        say("Ctrl-C stops it")
        while not stop.wait(_LOOK_S):
            broker.check_alive()
    say("broker stopped", file=sys.stderr)
    return 0


def _elsewhere(broker: EmbeddedBroker) -> str:
    """How other machines reach a broker that listens on every address."""
    if broker.host not in ("0.0.0.0", "::"):
        return ""
    return f" on this machine, and every address of it from others: mqtt://{_address()}:{broker.port}"


def _address() -> str:
    """An address by which others reach this machine; its name where none is known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # only looks up the route: nothing is sent
        except OSError:
            return socket.gethostname()
        return str(sock.getsockname()[0])


def _add_run(commands: Any) -> None:
    parser = add_command(commands, "run", run, "run the embedded broker", _RUN_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=1883, help="TCP port; 0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        default=str(default_dir("broker")),
        help="where it keeps retained messages and its log (default: %(default)s)",
    )
    parser.add_argument(
        "--kind",
        choices=("auto", "mosquitto", "amqtt"),
        default="auto",
        help="which broker; auto takes mosquitto if it is installed (default: %(default)s)",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="how much we log; the broker's own log is a file in its data directory (default: %(default)s)",
    )
    parser.add_argument(
        "--log-format",
        choices=get_args(LogFormat),
        default="text",
        help="how we log: text, or json for an object a line (default: %(default)s)",
    )


def _add_install(commands: Any) -> None:
    parser = add_install(commands, "broker", install, _INSTALL_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=1883, help="TCP port (default: %(default)s)")


def install(args: argparse.Namespace) -> int:
    """Write the unit and start it, or show it."""
    probe = Service(
        part="broker",
        words=(),
        settings=Path("/") if not args.user else Path.home(),
        state=system_state("broker"),
        for_user=args.user,
        run_as=args.run_as,
        root=args.root,
    )
    state = (args.state_dir or state_by_hand("broker", "", "", probe)).expanduser().absolute()
    where = ("--host", args.host, "--port", str(args.port), "--data-dir", str(state))
    service = msgspec.structs.replace(probe, words=("broker", "run", *where), state=state)
    return put_in_place(service, dry_run=args.dry_run)


def _add_render(commands: Any) -> None:
    parser = add_command(commands, "render", render, "write mosquitto.conf", _RENDER_HELP)
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="directory to write into; made if need be"
    )
