"""``sidestream doctor``: is this machine fit for its part, and the broker for the job?"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from broker_config.connection.connection import Connection
from broker_config.connection.tls import tls_context
from broker_config.settings import BrokerSettings
from broker_config.transport import Transport
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.samples.images import holds_images
from edge_agent.session.machine import detect_tier, device_name
from side_trainer.settings.implied import with_implied
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.state import cell_dirs, state_dir_of
from sidestream.backbone.runtimes import runtime_of
from sidestream.contract.errors import ConfigError, WireError
from sidestream.contract.plan import Plan
from sidestream.contract.tasks import Task
from sidestream.contract.topics import Topics
from sidestream.contract.wire import prepared, unpack
from sidestream.doctor.broker import Visit, check_broker_certificate, check_own_certificate, examine
from sidestream.doctor.data import check_data
from sidestream.doctor.finding import Finding, failed
from sidestream.doctor.machine import (
    check_backbone,
    check_certificate,
    check_clock,
    check_device,
    check_memory,
    check_state,
    check_torch,
)
from sidestream.host.commands import add_command
from sidestream.host.logs import silent
from sidestream.host.state_dir import default_dir
from sidestream.host.toml import load_config, read_table

_TRAINER_DISK_MIB: Final = 1024
_MEMORY_MIB: Final = 512
_SIGNS: Final = {"ok": "ok", "warning": "!", "failed": "FAILED", "skipped": "-"}
_ABOUT: Final = """\
See whether this machine is fit for its part, and the broker for the job: the broker is reached, its version,
packet limit, access list, what it keeps, round trip and bandwidth; clock, certificates, disk and memory; an
agent's data; torch and the backbone. What is wrong comes with what to do. Exits with 1 if anything failed.

    sidestream doctor agent.toml
    sidestream doctor trainer.toml --json
    sidestream doctor --broker mqtt://192.168.1.10:1883
"""


@prepared
class Patient(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the doctor sees."""

    broker: BrokerSettings
    job: str = ""
    """Empty where only the broker is known."""
    tier: str = ""
    """An agent's; empty for a trainer."""
    device: str = ""
    """An agent's name; empty for a trainer."""
    cell: str = ""
    """A trainer's, where there are several."""
    compute_device: str = "auto"
    """Where the agent is to compute."""
    backbone: str = ""
    """Where the agent's settings say it is."""
    data: DataConfig | None = None
    """An agent's."""
    state_dir: Path
    """Its state directory."""
    disk_mib: int
    """How much it may need."""
    quick: bool = False
    """Leave torch and the backbone out."""


def add_parser(subparsers: Any) -> None:
    """Add ``doctor``; its handler arrives as ``args.handler``."""
    parser = add_command(subparsers, "doctor", run, "see whether machine and broker are fit", _ABOUT)
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="an agent's or a trainer's settings"
    )
    parser.add_argument("--trainer", metavar="CONFIG", type=Path, help="the same, of a trainer only")
    parser.add_argument("--broker", metavar="URL", help="instead: only a broker")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="leave torch and the backbone out")


def run(args: argparse.Namespace) -> int:
    """Look, and say."""
    patients = [msgspec.structs.replace(one, quick=args.quick) for one in patients_of(args)]
    with silent():  # what goes wrong at the broker is a finding
        findings = [finding for one in patients for finding in _named(one, look_at(one))]
    if args.json:
        print(json.dumps(msgspec.to_builtins(findings), indent=2))
    else:
        for one in findings:
            print(f"{_SIGNS[one.state]:>6}  {one.check}: {one.said}")
            if one.remedy:
                print(f"        -> {one.remedy}")
    return 1 if any(one.state == "failed" for one in findings) else 0


def patients_of(args: argparse.Namespace) -> list[Patient]:
    """Read the settings that the command line names: a trainer's with cells have one each.

    Raises:
        ConfigError: none are, or several, or they are wrong.
    """
    given = [one for one in (args.config, args.trainer, args.broker) if one is not None]
    if len(given) != 1:
        raise ConfigError("CONFIG", "give the settings of an agent or a trainer, or --broker and a URL")
    if args.broker is not None:
        settings = BrokerSettings(url=args.broker)
        settings.endpoint()
        return [Patient(broker=settings, state_dir=default_dir("doctor"), disk_mib=0)]
    of_trainer = args.trainer
    if args.config is not None and "tiers" in read_table(args.config):  # only a trainer's settings have any
        of_trainer = args.config
    if of_trainer is not None:
        trainer = load_config(TrainerConfig, of_trainer, complete=with_implied).checked()
        return _of_trainer(trainer)
    agent = load_config(AgentConfig, args.config)
    agent.broker.endpoint()
    return [
        Patient(
            broker=agent.broker,
            job=agent.job,
            tier=agent.tier or detect_tier(),
            device=agent.device or device_name(agent.state_path),
            backbone=agent.backbone,
            compute_device=agent.compute_device,
            data=agent.data,
            state_dir=agent.state_path,
            disk_mib=agent.outbox_max_mib,
        )
    ]


def _of_trainer(trainer: TrainerConfig) -> list[Patient]:
    for broker in trainer.brokers:
        broker.endpoint()
    names = [one.name for one in trainer.cells] or [""]
    folders = cell_dirs(trainer) or [state_dir_of(trainer)]
    return [
        Patient(broker=broker, job=trainer.job, cell=cell, state_dir=folder, disk_mib=_TRAINER_DISK_MIB)
        for cell, broker, folder in zip(names, trainer.brokers, folders, strict=True)
    ]


def _named(patient: Patient, findings: list[Finding]) -> list[Finding]:
    """Findings that say of which cell they are."""
    if not patient.cell:
        return findings
    return [msgspec.structs.replace(one, check=f"{patient.cell}: {one.check}") for one in findings]


def look_at(patient: Patient, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Every check, in the order in which one fails for another's sake."""
    findings = _files(patient, clock())
    plan: Plan | None = None
    if not any(one.state == "failed" and one.check == "tls" for one in findings):
        if patient.broker.endpoint().tls:
            findings.append(check_broker_certificate(patient.broker, clock()))
        seen, payload = examine(_visit(patient))
        if patient.broker.endpoint().tls and seen[0].state == "failed":
            findings += check_own_certificate(patient.broker)
        findings += seen
        try:
            plan = unpack(Plan, payload) if payload else None
        except WireError as exc:
            findings.append(failed("plan", str(exc), "is another program writing to this job's topics?"))
    certificate = Path(patient.broker.cert_file) if patient.broker.cert_file else None
    findings.append(check_clock(clock(), certificate, plan))
    findings.append(check_state(patient.state_dir, patient.disk_mib))
    findings.append(check_memory(_MEMORY_MIB))
    if patient.data is not None:
        findings.append(check_data(patient.data, plan))
    if patient.job and not patient.quick and runtime_of(patient.backbone) == "torch":
        findings.append(check_torch())
    if patient.device:
        tier = plan.tiers.get(patient.tier) if plan is not None else None
        if plan is not None and tier is None:
            known = ", ".join(sorted(plan.tiers))
            findings.append(
                failed(
                    "tier",
                    f"the job has no tier {patient.tier!r}, only {known}",
                    "set tier = ... to one of them",
                )
            )
        if not patient.quick:
            reference = patient.backbone or (tier.backbone if tier else "")
            task = plan.task if plan is not None else _guessed(patient)
            findings.append(check_backbone(reference, tier, task=task))
            findings.append(check_device(patient.compute_device, reference))
    return findings


def _guessed(patient: Patient) -> Task:
    """What the job might be, by the data, while no plan says it."""
    data = patient.data
    images = data is not None and holds_images(data.path, data.format)
    return Task.IMAGE_CLASSIFICATION if images else Task.TEXT_CLASSIFICATION


def _files(patient: Patient, now_unix_s: float) -> list[Finding]:
    broker, found = patient.broker, []
    if broker.endpoint().tls:
        try:
            tls_context(broker)
        except ConfigError as exc:
            found.append(failed("tls", str(exc), "enrol the device again, or mend the settings"))
    for name, path in (("the authority", broker.ca_file), ("this machine", broker.cert_file)):
        if path:
            found.append(check_certificate(Path(path), name, now_unix_s))
    return found


def _visit(patient: Patient) -> Visit:
    topics = Topics(patient.job or "sidestream-doctor")
    if patient.device:
        echo, foreign = (
            topics.echo(patient.tier, patient.device),
            topics.echo(patient.tier, f"{patient.device[:40]}-neighbour"),
        )
    else:
        echo, foreign = topics.trainer_echo, Topics("sidestream-doctor-elsewhere").trainer_echo

    def connect(client_id: str) -> Transport:
        return Connection(patient.broker, client_id=client_id)

    return Visit(
        connect=connect,
        echo=echo,
        foreign=foreign,
        plan=topics.plan if patient.job else "",
        host=patient.broker.endpoint().host,
        port=patient.broker.endpoint().port,
        state_dir=patient.state_dir,
        patience_s=patient.broker.connect_timeout_s + 1.0,
    )
