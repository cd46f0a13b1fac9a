"""The doctor on the machine itself: disk, memory, clock, certificates, torch, backbone."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from cryptography import x509

from sidestream.backbone.runtimes import runtime_of
from sidestream.contract.errors import BackboneError, SidestreamError
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.tasks import TASKS, Task
from sidestream.doctor.finding import Finding, failed, ok, skipped, warning
from sidestream.host.model_folder import locate
from sidestream.host.state_dir import prepare

_MIB: Final = 1024 * 1024
_SOON_DAYS: Final = 30
_FENCE_SLACK_S: Final = 3600
_SUBPROCESS_S: Final = 300.0
_TORCH: Final = "import torch; print(torch.__version__)"
_DEVICES: Final = {
    "torch": """\
import sys
from sidestream.accelerator.torch_device import choose
print(choose(sys.argv[1]).chosen)
""",
    "onnx": """\
import sys, onnxruntime
from sidestream.accelerator.providers import ask_for, what_came
asked = ask_for(sys.argv[1], onnxruntime.get_available_providers())
print(what_came(sys.argv[1], asked, [asked[0][0]]))
""",
}
_BACKBONE: Final = """\
import json, sys
from sidestream.contract.tasks import Task
from sidestream.backbone.runtimes import load_backbone
b = load_backbone(sys.argv[1], int(sys.argv[2]), task=Task(sys.argv[3]))
print(json.dumps([b.fingerprint, b.depth, b.width]))
"""


def check_state(folder: Path, least_mib: int) -> Finding:
    """Whether the state directory can be written to, and the disk has room for what may come."""
    try:
        prepare(folder)
    except SidestreamError as exc:
        return failed("disk", str(exc), "mend its owner and permissions, or set another state_dir")
    free = shutil.disk_usage(folder).free // _MIB
    if free < least_mib:
        return warning(
            "disk",
            f"{free} MiB free at {folder}, {least_mib} may be needed",
            "free disk space, lower outbox_max_mib, or set another state_dir",
        )
    return ok("disk", f"{free} MiB free at {folder}")


def check_memory(least_mib: int, meminfo: Path = Path("/proc/meminfo")) -> Finding:
    """Whether there is memory for a process with torch."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) // 1024
    except (OSError, KeyError, ValueError):
        return skipped("memory", f"{meminfo} does not tell")
    if free < least_mib:
        return warning(
            "memory",
            f"{free} MiB available, {least_mib} are wanted",
            "end other programs, give the tier fewer layers or precision int8, or add swap",
        )
    return ok("memory", f"{free} MiB available")


def check_clock(now_unix_s: float, certificate: Path | None, plan: Plan | None) -> Finding:
    """Whether the clock is behind moments that have certainly passed."""
    if certificate is not None:
        try:
            begins = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_before_utc
        except (OSError, ValueError):
            begins = None
        if begins is not None and now_unix_s < begins.timestamp():
            return _behind(f"this machine's certificate was issued after {_date(now_unix_s)}")
    if plan is not None and plan.fence > now_unix_s + _FENCE_SLACK_S:
        return _behind(f"the trainer was started at {_date(plan.fence)}, here it is {_date(now_unix_s)}")
    if certificate is None and plan is None:
        return skipped("clock", "there is no certificate and no plan to compare it with")
    return ok("clock", f"{_date(now_unix_s)}, later than certificate and trainer's start")


def check_certificate(path: Path, name: str, now_unix_s: float) -> Finding:
    """Whether a certificate is valid, and stays so for a while."""
    check = f"certificate of {name}"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as exc:
        return failed(check, f"{path} cannot be read: {exc}", "enrol the device again")
    return certificate_finding(certificate, check, now_unix_s)


def certificate_finding(certificate: x509.Certificate, check: str, now_unix_s: float) -> Finding:
    """As :func:`check_certificate`."""
    now = datetime.datetime.fromtimestamp(now_unix_s, datetime.timezone.utc)
    ends = certificate.not_valid_after_utc
    remedy = (
        "sidestream fleet add-device NAME --again and enrol anew; the broker's: fleet rotate --certificates"
    )
    if now > ends:
        return failed(check, f"it ended on {ends.date()}", remedy)
    if (ends - now).days < _SOON_DAYS:
        return warning(check, f"it ends on {ends.date()}", remedy)
    return ok(check, f"valid until {ends.date()}")


def check_torch(python: str = sys.executable) -> Finding:
    """Whether torch can be imported, in a process of its own: on a wrong build that one dies."""
    code, said, wrong = _child([python, "-c", _TORCH])
    if code == 0:
        return ok("torch", f"version {said}")
    if code < 0:
        return failed(
            "torch",
            f"its import was killed by signal {-code}",
            "this build is not for this processor: install another one of torch (on a Jetson, NVIDIA's)",
        )
    return failed(
        "torch", f"it cannot be imported: {wrong}", "install it anew: pip install --force-reinstall torch"
    )


def check_backbone(
    reference: str,
    tier: TierPlan | None,
    python: str = sys.executable,
    task: Task = Task.TEXT_CLASSIFICATION,
) -> Finding:
    """Whether the backbone loads, and is the job's."""
    if not reference:
        return skipped("backbone", "neither the settings nor a plan name one")
    layers = tier.layers if tier is not None else 0
    remedy = "install it on this machine, or say with backbone = ... where it is"
    try:
        if runtime_of(reference) == "torch":
            locate(reference)
    except BackboneError as exc:
        return failed("backbone", str(exc), remedy)
    wanted = tier.fingerprint if tier is not None else ""
    code, said, wrong = _child([python, "-c", _BACKBONE, reference, str(layers), _encoding(task).value])
    if code != 0:
        return failed("backbone", f"{reference} cannot be loaded: {wrong or f'signal {-code}'}", remedy)
    fingerprint, depth, width = json.loads(said.splitlines()[-1])
    about = f"{reference}: {depth} layers of width {width}, fingerprint {fingerprint[:16]}"
    if wanted not in ("", fingerprint):
        return failed(
            "backbone",
            f"{about}, but the job's is {wanted[:16]}",
            "install the same model as the tier's other devices, or use another tier",
        )
    return ok("backbone", about)


def check_device(wanted: str, reference: str, python: str = sys.executable) -> Finding:
    """Where the backbone would be computed, and why there."""
    code, said, wrong = _child([python, "-c", _DEVICES[runtime_of(reference)], wanted])
    if code != 0:
        return failed("device", wrong or f"signal {-code}", "set compute_device to auto or cpu")
    return ok("device", said.splitlines()[-1])


def _encoding(task: Task) -> Task:
    """What a backbone is loaded for here: without an output head."""
    return Task.TEXT_CLASSIFICATION if TASKS[task].generates else task


def _child(command: list[str]) -> tuple[int, str, str]:
    """Exit code (negative for a signal), output, and the last line of the errors."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SUBPROCESS_S,
            env={**os.environ, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, "", f"nothing came of it in {_SUBPROCESS_S:.0f} s"
    lines = done.stderr.strip().splitlines()
    return done.returncode, done.stdout.strip(), lines[-1] if lines else ""


def _behind(said: str) -> Finding:
    return failed("clock", said, "set the clock: timedatectl set-ntp true, or add a clock to the board")


def _date(unix_s: float) -> str:
    return f"{datetime.datetime.fromtimestamp(unix_s, datetime.timezone.utc):%Y-%m-%d %H:%M}"
