"""``sidestream agent``: what is done once on a device."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_agent.commands.enrol import SETTINGS, default_config_dir, enrol, read_bundle
from edge_agent.commands.service_state import SYSTEM, state_of
from edge_agent.config import AgentConfig
from sidestream.contract.errors import ConfigError
from sidestream.host.commands import add_command
from sidestream.host.flags import add_flags, overrides
from sidestream.host.passwords import VARIABLE, asked_password, given_password
from sidestream.host.settings_init import write_settings
from sidestream.host.toml import load_config
from sidestream.service.install import add_install, put_in_place
from sidestream.service.systemd import Service

_ENROLL_HELP: Final = f"""\
Make this device one of a fleet, with the file that "sidestream fleet add-device" wrote: puts agent.toml, the
certificates and the trainer's public keys into place, for their owner only. The file's password is read from
--password-file or {VARIABLE}, or asked for.

    sidestream agent enroll pi-kitchen.enrol --data /home/pi/commands.csv
"""


_INIT_HELP: Final = """\
Write agent.toml with every setting explained; what you give is set, the rest is commented out with
its default.

    sidestream agent init agent.toml --job support-intents --broker mqtt://192.168.1.10:1883
"""
_INSTALL_HELP: Final = """\
Have systemd run the agent, now and after every start of the machine, as a service with few rights. It runs as
the owner of the settings, or as --run-as says, and goes on with the state of the same agent run by hand, so
that no sample is uploaded twice. With --user it is a service of yours: "loginctl enable-linger" lets it run
while you are not logged in.

    sudo sidestream agent install /etc/sidestream/agent.toml
"""


def add_commands(commands: Any, *, short: Mapping[str, str], secret: Collection[str]) -> None:
    """Add the commands to those of ``agent``.

    Args:
        commands: Where to.
        short: Further spellings of settings' flags.
        secret: Settings that get no flag.
    """
    _add_enroll(commands)
    init = add_command(commands, "init", write, "write a commented agent.toml", _INIT_HELP)
    init.add_argument("config", metavar="CONFIG", type=Path, help="file to write, such as agent.toml")
    init.add_argument("--replace", action="store_true", help="replace a file that is there")
    add_flags(init, AgentConfig, short=short, hidden=secret)
    installs = add_install(commands, "agent", install, _INSTALL_HELP)
    installs.add_argument(
        "config",
        metavar="CONFIG",
        type=Path,
        nargs="?",
        help="the device's settings (default: where enroll put them)",
    )


def _add_enroll(commands: Any) -> None:
    parser = add_command(commands, "enroll", enroll, "make this device one of a fleet", _ENROLL_HELP)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the file that add-device wrote")
    parser.add_argument("--password-file", metavar="FILE", type=Path, help="its first line is the password")
    parser.add_argument(
        "--config-dir",
        metavar="DIR",
        type=Path,
        help="where the files are put (default: /etc/sidestream for root, else ~/.config/sidestream)",
    )
    parser.add_argument("--data", metavar="PATH", default="", help="the device's samples, for agent.toml")
    parser.add_argument("--replace", action="store_true", help="replace an agent.toml that is there")


def enroll(args: argparse.Namespace) -> int:
    """Write the device's files."""
    bundle = read_bundle(args.bundle)
    password = given_password(args.password_file) or asked_password(f"password of {args.bundle.name}")
    if not password:
        raise ConfigError("password", f"there is none; give --password-file, or set {VARIABLE}")
    folder = args.config_dir or default_config_dir()
    data = str(Path(args.data).expanduser().absolute()) if args.data and args.data != "-" else args.data
    enrolment = enrol(bundle, password, folder, data=data, replace=args.replace)
    settings = folder.expanduser().absolute() / SETTINGS
    print(f"device {enrolment.device!r} (tier {enrolment.tier}) of job {enrolment.job!r} at {enrolment.url}")
    print(f"wrote {settings}, with certificates and keys beside it; {args.bundle} is no longer needed")
    if not args.data:
        print("next: name its samples in agent.toml, [data] path")
    print(f"then: sidestream agent run {settings}")
    return 0


def write(args: argparse.Namespace) -> int:
    """Write a settings file."""
    head = f"The settings of a device's agent: sidestream agent run {args.config}"
    write_settings(AgentConfig, args.config, overrides(args), head, replace=args.replace)
    print(f"wrote {args.config}; check it with: sidestream agent run {args.config} --check")
    return 0


def install(args: argparse.Namespace) -> int:
    """Write the unit and start it, or show it."""
    settings = (args.config or default_config_dir() / SETTINGS).expanduser().absolute()
    config = load_config(AgentConfig, settings)
    service = service_of(settings, SYSTEM, for_user=args.user, run_as=args.run_as, root=args.root)
    state = args.state_dir or state_of(
        config, service.user, service.owner, for_user=args.user, root=args.root
    )
    state = state.expanduser().absolute()
    service = service_of(settings, state, for_user=args.user, run_as=args.run_as, root=args.root)
    if config.trace_path:
        folder = Path(config.trace_path).expanduser().absolute().parent
        service = msgspec.structs.replace(service, writes=(folder,))
    return put_in_place(service, dry_run=args.dry_run)


def service_of(
    settings: Path, state: Path, *, for_user: bool, run_as: str = "", root: Path = Path("/")
) -> Service:
    """The agent as a service."""
    words = ("agent", "run", str(settings), "--state-dir", str(state))
    return Service(
        part="agent", words=words, settings=settings, state=state, for_user=for_user, run_as=run_as, root=root
    )
