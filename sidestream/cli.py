"""The ``sidestream`` command: one parser, one place where errors become a line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NoReturn

import sidestream.completion
from sidestream.contract.errors import SidestreamError
from sidestream.host.logs import fail
from sidestream.host.signals import INTERRUPTED
from sidestream.service.state_choice import find_state_dir
from sidestream.version import version

_ROOMS: Final = {
    "demo": "sidestream.demo.cli",
    "fleet": "sidestream.fleet.cli",
    "doctor": "sidestream.doctor.cli",
    "broker": "broker_config.cli",
    "trainer": "side_trainer.operator.commands",
    "agent": "edge_agent.commands.agent",
    "backbone": "sidestream.backbone.commands",
    "leakage": "sidestream.leakage.cli",
    "metrics": "metrics.cli",
    "top": "sidestream.top.cli",
}
"""By command, the module whose ``add_parser`` adds it. Only the one that is asked for is imported."""
_OURS = ("sidestream", "edge_agent", "side_trainer", "broker_config", "metrics")
_DESCRIPTION = """\
Federated fine-tuning of transformers on edge devices over MQTT. Devices run only the forward pass of a frozen
backbone and publish sampled, quantised activations; a trainer learns a small side-network from them and
publishes it back; devices predict with both.

  sidestream demo                        a whole fleet on this machine, in a minute or two
  sidestream broker run                  a broker on this machine
  sidestream trainer run trainer.toml    the trainer of a job
  sidestream agent run agent.toml        the agent on a device
  sidestream top                         the fleet in a terminal
  sidestream fleet init DIR              certificates, access and keys of a fleet
  sidestream doctor agent.toml           whether machine and broker are fit
  sidestream agent predict --state-dir DIR "some text"
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where the help is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser(command: str = "") -> argparse.ArgumentParser:
    """The command line: all of it, or what a command that there is needs, which starts sooner."""
    parser = _Parser(
        prog="sidestream",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sidestream {version()}")
    parser.set_defaults(handler=lambda args: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for room in [_ROOMS[command]] if command in _ROOMS else _ROOMS.values():
        import_module(room).add_parser(commands)
    sidestream.completion.add_parser(commands, parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if it did what it was asked, 1 if it could not, 2 for wrong arguments, 130 after Ctrl-C.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] in (["agent"], ["demo"]):
        # Before NumPy is imported, which makes its threads then. An agent needs none of them, and those of
        # several processes on one machine wait for each other in loops.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    args = build_parser(given[0] if given else "").parse_args(given)
    try:
        find_state_dir(args)
        code: int = args.handler(args) or 0
        sys.stdout.flush()
    except SidestreamError as exc:
        fail(exc)
        return 1
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] in _OURS:
            raise
        fail(
            SidestreamError(
                f"{exc.name} is not installed here, and this command takes it: pip install sidestream"
            )
        )
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
