"""What devices say of themselves: births and ends, telemetry; and what the job learns from that."""

from __future__ import annotations

import logging
import time

from broker_config.transport import Received
from metrics.catalogue import Kind, Reason
from side_trainer.autotune.tuner import Tuner
from side_trainer.broadcast.downlink import Downlink
from side_trainer.figures import Figures
from side_trainer.job import Job
from side_trainer.receive.absence import Absences
from side_trainer.receive.refusals import Refusals
from side_trainer.receive.setbacks import Setbacks
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import DecodeError, MismatchError, StorageError
from sidestream.contract.messages import Status, Telemetry
from sidestream.contract.spelling import Spellings
from sidestream.contract.topics import Uplink
from sidestream.contract.wire import unpack

_log = logging.getLogger(__name__)


class Reports:
    """Belongs to the ingest thread.

    Args:
        job: What births settle.
        figures: Have the view of the devices.
        downlink: Tells a device that came what of its streams is here.
        setbacks: Told of telemetry.
        refusals: For what cannot be read.
        tuner: Chooses by what they tell; None where nothing is chosen.
    """

    def __init__(
        self,
        job: Job,
        figures: Figures,
        downlink: Downlink,
        setbacks: Setbacks,
        refusals: Refusals,
        tuner: Tuner | None = None,
    ) -> None:
        self._job = job
        self._figures = figures
        self._fleet = figures.fleet
        self._downlink = downlink
        self._setbacks = setbacks
        self._refusals = refusals
        self._tuner = tuner
        self._absences = Absences()
        self._births: dict[tuple[str, str], Status] = {}
        self._spellings = Spellings()

    def on_report(self, uplink: Uplink, event: Received, now: float) -> None:
        """A status or telemetry message; an empty status takes the device off the list."""
        if not event.payload:
            if uplink.kind == Kind.STATUS.value and self._fleet.forget(uplink.tier, uplink.device):
                _log.info("device %s (%s) is forgotten: its status was cleared", uplink.device, uplink.tier)
            return
        try:
            if uplink.kind == Kind.TELEMETRY.value:
                self._on_telemetry(uplink, unpack(Telemetry, event.payload), now)
            else:
                self._on_status(uplink, unpack(Status, event.payload), now, retained=event.retained)
        except DecodeError as exc:
            self._refusals.reject(uplink, event, Reason.UNDECODABLE, str(exc))
        except MismatchError as exc:
            self._refusals.reject(uplink, event, Reason.UNKNOWN_TIER, str(exc))
        except StorageError as exc:
            _log.error("%s; what a device has lost is noted when it next tells", exc)

    def on_batch(self, uplink: Uplink, now: float) -> None:
        """A batch came, whatever is in it."""
        self._warn_of(uplink, self._absences.on_batch(uplink.tier, uplink.device, now))

    def disconnected(self) -> None:
        """Nothing is heard for a while, and that is not the devices' fault."""
        self._absences.disconnected()

    def settle(self, now: float) -> bool:
        """Let the job learn from births; return whether the plan changed.

        Raises:
            StateError: the journal cannot be written to; births that are not in it wait here.
        """
        changed = self._job.tick(now)
        while self._births:
            (tier, device), status = next(iter(self._births.items()))
            changed = self._job.on_birth(tier, device, status, now) or changed
            del self._births[tier, device]
        return changed

    def add_tiers(self, config: TrainerConfig) -> bool:
        """Hear the devices of more tiers; return whether there are any."""
        if config.tiers.keys() <= self._job.plan.tiers.keys():
            return False
        self._figures.add_tiers(config.tiers)
        self._job.reconfigure(config)
        return True

    def _on_telemetry(self, uplink: Uplink, told: Telemetry, now: float) -> None:
        self._fleet.on_telemetry(uplink.tier, uplink.device, told, now, unix_s=time.time())
        self._warn_of(uplink, self._absences.on_telemetry(uplink.tier, uplink.device, told.batches_sent, now))
        if self._tuner is not None:
            self._tuner.on_telemetry(uplink, told, now)
        self._setbacks.on_telemetry(uplink, told)

    def _on_status(self, uplink: Uplink, status: Status, now: float, *, retained: bool) -> None:
        repeated = retained and self._fleet.was_told(uplink.tier, uplink.device, status)
        if not self._fleet.on_status(uplink.tier, uplink.device, status, now):
            return
        if repeated:  # it is we who have connected anew: thousands of devices need no word on that
            return
        if status.state == "online":
            _log.info("device %s (%s) is online", uplink.device, uplink.tier, extra=_about(uplink))
            self._births[uplink.tier, uplink.device] = status
            for odd in self._spellings.add(status.labels, f"device {uplink.device}"):
                _log.warning("%s", odd, extra=_about(uplink))
                self._figures.board.tell("labels", odd)
        else:
            where = (uplink.device, uplink.tier, status.reason)
            _log.info("device %s (%s) is offline: %s", *where, extra=_about(uplink))
        # It may be less than they were told before: a journal can be set back.
        for stream in status.kept_streams:
            self._downlink.receipt(uplink, stream, retain=False)
        self._downlink.receipt(uplink, status.stream)

    def _warn_of(self, uplink: Uplink, why: str) -> None:
        tier, device = uplink.tier, uplink.device
        if why:
            _log.warning("device %s (%s) %s", device, tier, why, extra=_about(uplink))
        self._fleet.set_undelivered(tier, device, self._absences.wrong(tier, device))


def _about(uplink: Uplink) -> dict[str, str]:
    """Where a message came from, for a log that is for programs."""
    return {"device": uplink.device, "tier": uplink.tier}
