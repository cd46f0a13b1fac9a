"""``sidestream fleet``: a fleet's folder, its devices, its keys."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from broker_config.enrolment import check_password, encrypt_enrolment
from side_trainer.settings.implied import with_implied
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import ConfigError, StateError
from sidestream.contract.signing import key_id
from sidestream.fleet.folder import FleetFolder, create, opened
from sidestream.host.commands import Handler, add_command, add_group
from sidestream.host.passwords import VARIABLE, asked_password, given_password, made_up_password
from sidestream.host.state_dir import write_atomically
from sidestream.host.toml import load_config

_ABOUT: Final = """\
Set up a fleet behind certificates: everybody at the broker is known, may read and write what is his, and
devices adopt only what the trainer signed. On the server:

    sidestream fleet init fleet --job support-intents --host 192.168.1.10 --tier pi5
    mosquitto -c fleet/broker/mosquitto.conf
    sidestream trainer run fleet/trainer/trainer.toml
    sidestream fleet add-device fleet pi-kitchen --tier pi5

On the device, with the file that add-device wrote:

    sidestream agent enroll pi-kitchen.enrol
"""
_RELOAD: Final = "have the broker read its files again: systemctl reload mosquitto, or kill -HUP and its pid"


def add_parser(subparsers: Any) -> None:
    """Add ``fleet`` with its commands; the chosen handler arrives as ``args.handler``."""
    commands = add_group(subparsers, "fleet", "certificates, access and keys of a fleet", _ABOUT)
    _add_init(commands)
    _add_device(commands)
    revokes = _command(
        commands, "revoke", revoke, "keep a device out from now on, by its certificate and by the access list"
    )
    revokes.add_argument("name", metavar="NAME", help="the device")
    lists = _command(
        commands, "list", show, "list the devices, when their certificates end, and which are revoked"
    )
    lists.add_argument("--json", action="store_true", help="print JSON")
    rotates = _command(
        commands,
        "rotate",
        rotate,
        "change the trainer's signing key in two steps: make a new one known to all, then sign with it",
    )
    which = rotates.add_mutually_exclusive_group()
    which.add_argument(
        "--finish", action="store_true", help="the second step, once every device has been online"
    )
    which.add_argument(
        "--certificates", action="store_true", help="instead: new certificates for broker and trainer"
    )


def _command(commands: Any, name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
    parser = add_command(commands, name, handler, text)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the fleet's folder")
    return parser


def _add_init(commands: Any) -> None:
    parser = _command(
        commands,
        "init",
        init,
        "make a fleet's folder: authority, broker's files, trainer's settings and keys",
    )
    parser.add_argument("--job", required=True, metavar="NAME", help="the job's name")
    parser.add_argument(
        "--host",
        required=True,
        action="append",
        metavar="HOST",
        help="name or address by which devices reach the broker; may be given several times, and devices use "
        "the first",
    )
    parser.add_argument("--port", type=int, default=8883, help="its port (default: %(default)s)")
    parser.add_argument(
        "--tier",
        action="append",
        metavar="NAME",
        help="a tier for trainer.toml to begin with; may be given several times (default: generic)",
    )
    parser.add_argument(
        "--broker-dir",
        metavar="DIR",
        default="",
        help="where the folder broker/ will stand on the broker's machine (default: where it is made)",
    )
    parser.add_argument(
        "--broker-user", metavar="NAME", default="", help="who owns it there (default: whoever runs this)"
    )


def _add_device(commands: Any) -> None:
    parser = _command(
        commands,
        "add-device",
        add_device,
        "let a device in, and write the file that it is enrolled with. A password protects the file: it is "
        f"read from --password-file, from {VARIABLE}, or asked for; with none of these, or nothing typed, "
        "one is made up and shown once",
    )
    parser.add_argument("name", metavar="NAME", help="the device's name")
    parser.add_argument("--tier", required=True, metavar="NAME", help="its hardware tier, such as pi5")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="file to write (default: DIR/bundles/NAME.enrol)"
    )
    parser.add_argument("--password-file", metavar="FILE", type=Path, help="its first line is the password")
    parser.add_argument(
        "--again", action="store_true", help="the device has a certificate, which is revoked for the new one"
    )


def init(args: argparse.Namespace) -> int:
    """Make the folder, and say what comes next."""
    if not 1 <= args.port <= 65535:
        raise ConfigError("--port", f"is {args.port}; it must be from 1 to 65535")
    folder = create(
        args.folder,
        job=args.job,
        hosts=args.host,
        port=args.port,
        broker_dir=args.broker_dir,
        tiers=args.tier or ["generic"],
        user=args.broker_user,
    )
    path = folder.path
    print(f"made {path}, for job {args.job!r} at {folder.fleet.url}")
    print("keep it to yourself: whoever has its ca/ can let anybody in")
    print("next:")
    print(f"  mosquitto -c {folder.fleet.broker_dir}/mosquitto.conf")
    print(f"  sidestream trainer run {path / 'trainer' / 'trainer.toml'}")
    print(f"  sidestream fleet add-device {args.folder} NAME --tier {(args.tier or ['generic'])[0]}")
    if folder.fleet.user == "root":
        print(
            "note: made by root, so the broker will run as root; --broker-user names another", file=sys.stderr
        )
    return 0


def add_device(args: argparse.Namespace) -> int:
    """Write the bundle."""
    password = given_password(args.password_file)
    if password is None:
        password = asked_password(f"password for {args.name}'s bundle (empty: make one up)", twice=True)
    made_up = "" if password else made_up_password()
    password = check_password(password or made_up)
    with opened(args.folder) as folder:
        out = args.out or folder.path / "bundles" / f"{args.name}.enrol"
        sealed = encrypt_enrolment(folder.add_device(args.name, args.tier, again=args.again), password)
        try:
            write_atomically(out, sealed)
        except OSError as exc:
            raise StateError(f"{out} cannot be written: {exc.strerror or exc}") from exc
        print(f"wrote {out}; on the device: sidestream agent enroll {out.name}")
        if made_up:
            print(f"its password, shown this once: {made_up}")
        print(_RELOAD)
        _warn_of_tier(folder, args.tier)
    return 0


def revoke(args: argparse.Namespace) -> int:
    """Keep a device out."""
    with opened(args.folder) as folder:
        folder.revoke(args.name)
    print(f"{args.name} is revoked; {_RELOAD}")
    print("until then it keeps its rights. What was learnt stays; sidestream trainer rebuild takes it out")
    return 0


def show(args: argparse.Namespace) -> int:
    """List the devices."""
    with opened(args.folder) as folder:
        fleet = folder.fleet
        keys = [key_id(key) for key in folder.signing_keys]
    if args.json:
        print(json.dumps({**msgspec.to_builtins(fleet), "signing_keys": keys}, indent=2))
        return 0
    upcoming = f", next {keys[1]}" if len(keys) > 1 else ""
    print(f"job {fleet.job} at {fleet.url}; signing key {keys[0]}{upcoming}")
    for one in fleet.devices:
        state = f"revoked {one.revoked}" if one.revoked else f"until {one.expires}"
        print(f"  {one.name:32} {one.tier:16} {state}")
    print(f"{len(fleet.members)} devices are let in")
    return 0


def rotate(args: argparse.Namespace) -> int:
    """Change keys."""
    with opened(args.folder) as folder:
        if args.certificates:
            print(f"broker and trainer have new certificates, until {folder.renew_broker()}")
            print(f"restart both; or {_RELOAD}")
            return 0
        old, new = folder.change_key() if args.finish else folder.announce_key()
    if args.finish:
        print(f"restart the trainer: it then signs with {key_id(new)}; {key_id(old)} is no longer trusted")
        return 0
    print(f"restart the trainer: it makes key {key_id(new)} known, and goes on signing with {key_id(old)}")
    print("once every device has been online: sidestream fleet rotate DIR --finish, and restart it again.")
    print("A device that was away all the time has to be enrolled again")
    return 0


def _warn_of_tier(folder: FleetFolder, tier: str) -> None:
    """A device of a tier that the trainer does not know would wait in vain."""
    path = folder.path / "trainer" / "trainer.toml"
    try:
        tiers = load_config(TrainerConfig, path, complete=with_implied).tiers
    except ConfigError:
        return
    if tier not in tiers:
        print(
            f"note: {path} has no [tiers.{tier}] yet; add it, the running trainer takes it up",
            file=sys.stderr,
        )
