"""``sidestream agent``: what is done once on a device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from contract.errors import ConfigError
from edge_agent.enrol import SETTINGS, default_config_dir, enrol, read_bundle
from host.passwords import VARIABLE, asked_password, given_password

_ENROLL_HELP: Final = f"""\
Make this device one of a fleet, with the file that "sidestream fleet add-device" wrote: puts agent.toml, the
certificates and the trainer's public keys into place, for their owner only. The file's password is read from
--password-file or {VARIABLE}, or asked for.

    sidestream agent enroll pi-kitchen.enrol --data /home/pi/commands.csv
"""


def add_commands(commands: Any) -> None:
    """Add the commands to those of ``agent``."""
    parser = commands.add_parser(
        "enroll",
        help="make this device one of a fleet",
        description=_ENROLL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    parser.set_defaults(handler=enroll)


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
    print(f"wrote {settings}, with certificates and keys beside it; {args.bundle} is of no more use")
    if not args.data:
        print("next: name its samples in agent.toml, [data] path")
    print(f"then: sidestream agent run {settings}")
    return 0
