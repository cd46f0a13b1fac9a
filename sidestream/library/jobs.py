"""A job as data: its plan, what the trainer's folder holds, the curves of its page."""

from __future__ import annotations

import secrets
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from broker_config.connection.connection import Connection
from broker_config.settings import BrokerSettings
from broker_config.transport import Event, Received
from metrics.fleet_page.view import FleetView
from side_trainer.operator.status import TrainerState, read_state
from sidestream.contract.errors import BrokerError, SidestreamError, StateError
from sidestream.contract.plan import Plan
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack
from sidestream.host.state_dir import default_dir

_ANSWER_S: Final = 15.0
_MOST_BYTES: Final = 64 * 2**20


def plan(broker: str | BrokerSettings, job: str) -> Plan:
    """The job's plan, as it stands on the broker: task, labels, tiers. Its signature is not checked.

    Raises:
        BrokerError: the broker cannot be reached.
        StateError: it has no plan of that job.
    """
    settings = BrokerSettings(url=broker) if isinstance(broker, str) else broker
    found, came = list[bytes](), threading.Event()

    def hear(event: Event) -> None:
        if isinstance(event, Received) and event.payload:
            found.append(event.payload)
            came.set()

    connection = Connection(settings, client_id=f"sidestream-plan-{secrets.token_hex(8)}")
    try:
        connection.subscribe(Topics(job).plan)
        connection.start(hear)
        if not connection.wait_connected(_ANSWER_S):
            raise BrokerError(f"the broker cannot be reached: {connection.last_error or 'no answer'}")
        if not came.wait(_ANSWER_S):
            raise StateError(f"there is no plan of job {job!r} on the broker; is its trainer running?")
        return unpack(Plan, found[-1])
    finally:
        connection.close()


def status(state_dir: str | Path = "", *, job: str = "") -> TrainerState:
    """What a trainer's state directory holds: records, samples, devices.

    Args:
        state_dir: The folder; or,
        job: the job's name, if it is where the trainer keeps it by itself.

    Raises:
        StateError: if there is no journal.
    """
    return read_state(Path(state_dir).expanduser() if state_dir else default_dir("trainer", job))


def fleet_view(page: str) -> FleetView:
    """All that a trainer's fleet page shows: devices with their troubles, tiers, labels, events.

    Raises:
        SidestreamError: there is no page.
    """
    url = f"{page.rstrip('/')}/api/fleet"
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
            return msgspec.json.decode(answer.read(_MOST_BYTES), type=FleetView)
    except (OSError, ValueError) as exc:
        raise SidestreamError(f"no fleet page at {page}: {exc}") from exc


def curves(page: str) -> dict[str, list[dict[str, Any]]]:
    """The curves of a trainer's fleet page, as columns for a data frame.

    Returns:
        By name (``accuracy``, ``loss``, ``samples``, …), rows with ``at_unix_s``, ``value``, and
        for what is by tier ``tier`` and ``version``.
    """
    view, found = fleet_view(page), dict[str, list[dict[str, Any]]]()
    for point in view.points:
        for name in point.__struct_fields__:
            value = getattr(point, name)
            if name in ("at_unix_s", "revision", "versions"):
                continue
            rows = found.setdefault(view.measure if name == "quality" else name, [])
            if not isinstance(value, Mapping):
                rows.append({"at_unix_s": point.at_unix_s, "value": value})
                continue
            for tier, one in value.items():
                about = {"tier": tier, "version": point.versions.get(tier)}
                rows.append({"at_unix_s": point.at_unix_s, "value": one, **about})
    return found
