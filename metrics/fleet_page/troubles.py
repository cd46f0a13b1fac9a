"""What is the matter with a device, in words: the reasons by which page and ``sidestream top`` sort. Pure.

Each kind has a section in docs/operations.md, which says what to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from metrics.accounts import account
from metrics.fleet_page.fleet import Device, State
from metrics.fleet_page.summary import outbox_fill
from metrics.fleet_page.view import RefusalView
from sidestream.contract.messages import Telemetry

EXPIRES_SOON_S: Final = 14 * 86_400.0
"""A certificate that ends in less is told of."""
REFUSED_LATELY_S: Final = 600.0
"""A refused message counts as trouble for so long."""
NO_DATA_AFTER_S: Final = 60.0
"""A device that has read nothing for so long after it came, or waited for anything, has no data."""
WAITS_AFTER_S: Final = 15.0
"""Whoever has just come may wait a little: a plan takes a moment."""
OUTBOX_FULL: Final = 0.8
"""An outbox this full is about to stop its device."""
SLOW_RECEIPT_S: Final = 10.0
"""A batch that takes longer to be receipted is on a slow link."""
HOT_CELSIUS: Final = 80.0
"""Most boards slow down soon above that."""
CLOCK_OFF_S: Final = 60.0
"""A clock that is further off is wrong: certificates and logs go by it."""
BEHIND_AFTER_S: Final = 900.0
"""A newer version that has been out for so long should have been taken up."""

TITLES: Final[dict[str, str]] = {
    "failed": "Ended with an error",
    "certificate": "Certificate expired",
    "absent": "Absent",
    "quarantined": "Quarantined",
    "weights": "Other weights than its tier's",
    "refused": "Refused by the trainer",
    "undelivered": "Messages do not arrive",
    "labels": "Labels unknown to the job",
    "no-data": "No data",
    "unusable": "Data that cannot be used",
    "outbox": "Outbox full",
    "link": "Link slow",
    "hot": "Too hot",
    "clock": "Clock wrong",
    "behind": "Weights old",
    "waiting": "Waits",
    "expiring": "Certificate ends soon",
    "stopped": "Stopped early",
}
"""Every kind of trouble with its title, the worst first."""
_UNREADABLE: Final = " (another encoding, no text, or too many fields: its log names the first lines)"
SEVERE: Final = frozenset(
    {"failed", "certificate", "absent", "quarantined", "weights", "refused", "undelivered"}
)
"""Kinds by which nothing that a device has is learnt."""


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What is known of a device beside what it says."""

    state: State
    """What it is up to."""
    online: bool
    """Whether it is there."""
    now: float
    """By the fleet's clock."""
    unix_s: float
    """The time."""
    fingerprint: str = ""
    """Of its tier's backbone; empty if it is not settled."""
    held: str | None = None
    """Why it is in quarantine; None if it is not."""
    refusal: RefusalView | None = None
    """The last refused message of it."""
    outdated_s: float = 0.0
    """For how long there has been a newer version than the one in use on it."""


def troubles_of(device: Device, about: Circumstances) -> dict[str, str]:
    """Words by kind, the worst first; empty for a device that is well."""
    found = {**_of_its_presence(device, about), **_of_what_it_sends(device, about)}
    if device.telemetry is not None:
        found |= _of_its_data(device, device.telemetry, about)
        if not {"failed", "absent", "weights"}.isdisjoint(found):
            found.pop("no-data", None)  # it follows
        if about.online:
            found |= _of_its_machine(device, device.telemetry, about)
    return {kind: found[kind] for kind in TITLES if found.get(kind)}


def _of_its_presence(device: Device, about: Circumstances) -> dict[str, str]:
    found: dict[str, str] = {}
    expires_in_s = device.certificate_expires_unix_s - about.unix_s
    if device.certificate_expires_unix_s and expires_in_s < EXPIRES_SOON_S:
        day = time.strftime("%Y-%m-%d", time.gmtime(device.certificate_expires_unix_s))
        if expires_in_s < 0:
            found["certificate"] = f"its certificate expired on {day}: enrol it again"
        else:
            found["expiring"] = f"its certificate ends on {day}: enrol it again before that"
    if about.state is State.SILENT:
        found["absent"] = "nothing is heard of it, though it never said that it leaves"
    elif about.state is State.LOST and device.reason in ("", "lost"):
        found["absent"] = "its connection broke: power, network, certificate, or the agent was killed"
    elif about.state is State.LOST:
        found["failed"] = f"it ended with an error: {device.reason}"
    elif about.state is State.GONE:
        found["stopped"] = "it was stopped before its data had ended"
    return found


def _of_what_it_sends(device: Device, about: Circumstances) -> dict[str, str]:
    found: dict[str, str] = {}
    if about.held is not None:
        found["quarantined"] = f"what it sends is kept and not learnt from: {about.held or 'by the operator'}"
    if device.fingerprint and about.fingerprint and device.fingerprint != about.fingerprint:
        found["weights"] = (
            f"its backbone has fingerprint {device.fingerprint[:8]}…, its tier's {about.fingerprint[:8]}…: "
            "install the same model"
        )
    last = about.refusal
    if last is not None and about.unix_s - last.at_unix_s < REFUSED_LATELY_S:
        found["refused"] = f"its {last.kind} are refused: {last.reason}"
    if device.undelivered:
        found["undelivered"] = f"it {device.undelivered}"
    return found


def _of_its_data(device: Device, told: Telemetry, about: Circumstances) -> dict[str, str]:
    found, taken = dict[str, str](), account(told)
    whole = f"of the {taken.read} samples read"
    if told.skipped_label:
        found["labels"] = f"{told.skipped_label} {whole} have a label that the job does not have"
    others = [f"{count} {why}" for count, why in taken.left_out if "label that" not in why]
    if others:
        why = _UNREADABLE if told.samples_broken else ""
        found["unusable"] = f"not used {whole}: {', '.join(others)}{why}"
    if told.samples_dropped:
        found["outbox"] = f"its full outbox dropped {told.samples_dropped} samples"
    since_s = about.now - max(device.first_heard, device.waited)
    if not told.samples_read and not told.trouble and (told.finished or since_s > NO_DATA_AFTER_S):
        found["no-data"] = "it has read no sample: its data is empty or missing, or it is only to predict"
    return found


def _of_its_machine(device: Device, told: Telemetry, about: Circumstances) -> dict[str, str]:
    found: dict[str, str] = {}
    if (full := outbox_fill(told)) > OUTBOX_FULL:
        found["outbox"] = f"its outbox is {full:.0%} full: computing stops, or the oldest batches are dropped"
    if told.receipt_s is not None and told.receipt_s > SLOW_RECEIPT_S and told.outbox_batches:
        found["link"] = f"a batch takes {told.receipt_s:.0f} s to be receipted; {told.outbox_batches} wait"
    if told.temperature_celsius is not None and told.temperature_celsius > HOT_CELSIUS:
        found["hot"] = f"it is at {told.temperature_celsius:.0f} °C"
    if told.unix_s and abs(device.clock_off_s) > CLOCK_OFF_S:
        way = "ahead" if device.clock_off_s > 0 else "behind"
        found["clock"] = f"its clock is {_span(abs(device.clock_off_s))} {way}"
    if about.outdated_s > BEHIND_AFTER_S:
        found["behind"] = (
            f"a newer version has been out for {_span(about.outdated_s)}, and it has not taken it up"
        )
    if told.trouble and about.now - device.first_heard > WAITS_AFTER_S:
        found["waiting"] = told.trouble
    return found


def _span(seconds: float) -> str:
    units: tuple[tuple[float, str], ...] = ((86_400, "days"), (3600, "hours"), (60, "minutes"))
    size, name = next(((size, name) for size, name in units if seconds >= 2 * size), (1, "seconds"))
    return f"{seconds / size:.0f} {name}"


Held = Callable[[str], str | None]
"""Why a device is in quarantine; None if it is not."""
