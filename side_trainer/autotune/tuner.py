"""Chooses for the devices of a running job: journals each choice, has its device know, and shows it.

A choice is a record of the journal, so that a restart goes on from it, and nobody has to ask what was chosen
when and why. The device's answer is its telemetry: it names the assignment that it goes by. One that goes by
another is told again now and then; one that never takes any is left as it is.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from metrics.catalogue import Chosen
from metrics.fleet_page.fleet import MAX_DEVICES
from metrics.fleet_page.view import AssignedView
from side_trainer.autotune.choices import Choices, Setting
from side_trainer.autotune.governor import Accuracy, Choice, Governor
from side_trainer.autotune.window import Meter
from side_trainer.broadcast.downlink import Downlink
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.figures import Figures
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import AssignmentRecord, Quantity, RecordKind
from side_trainer.settings.tuning import TuningConfig
from sidestream.contract.errors import StateError
from sidestream.contract.messages import Telemetry
from sidestream.contract.topics import Topics, Uplink

_log = logging.getLogger(__name__)
_HOUR_S: Final = 3600.0
_AGAIN_S: Final = 600.0
_SUM_UP_S: Final = 60.0
_AT_ONCE: Final = 100
_CHOSEN: Final = {what: Chosen(what.value) for what in Quantity}


@dataclass(kw_only=True)
class _Device:
    """One that is judged."""

    governor: Governor
    meter: Meter
    record: AssignmentRecord | None = None
    """The last choice; None while the device is to go by its tier's plan."""
    offset: int = 0
    """Of that record."""
    revision: int = -1
    """Of the plan that its choices are of."""
    told_s: float | None = None
    """When it was last told, by the caller's clock."""
    heeds: bool = True
    """Whether it said that it goes by what it is to go by."""


class Tuner:
    """Belongs to the ingest thread.

    Args:
        tuning: Bounds and times.
        journal: Where choices are kept, and those of earlier starts found.
        job: Has the plan.
        link: Has the fence, and says whether this is the job's trainer.
        downlink: Tells.
        topics: The job's.
        signer: Signs what devices are told.
        figures: Have the tiers' accuracies; show what was chosen.
        clock: Unix time, in seconds.
        most: Devices that are judged at a time.
    """

    def __init__(
        self,
        tuning: TuningConfig,
        journal: Journal,
        job: Job,
        link: LeaderTransport,
        downlink: Downlink,
        topics: Topics,
        signer: TrainerSigner,
        figures: Figures,
        *,
        clock: Callable[[], float] = time.time,
        most: int = MAX_DEVICES,
    ) -> None:
        self._tuning = tuning
        self._journal = journal
        self._job = job
        self._link = link
        self._downlink = downlink
        self._topics = topics
        self._signer = signer
        self._figures = figures
        self._clock = clock
        self._most = most
        self._devices: dict[tuple[str, str], _Device] = {}
        self._records: dict[tuple[str, str], list[tuple[int, AssignmentRecord]]] = {}
        self._owed: dict[tuple[str, str], None] = {}
        self._by_tier: Mapping[str, Accuracy] = {}
        self._summed_s: float | None = None
        self._told_fence = -1  # of the reign in which all that stands was told
        for record in journal.others(journal.tail, (RecordKind.ASSIGNMENT.value,)):
            chosen = msgspec.json.decode(record.payload, type=AssignmentRecord)
            self._records.setdefault((chosen.tier, chosen.device), []).append((record.offset, chosen))
        figures.assigned = self.shown

    def on_telemetry(self, uplink: Uplink, told: Telemetry, now: float) -> None:
        """A device's report; what follows from it is journaled and told at once."""
        key = uplink.tier, uplink.device
        device = self._device(key)
        if device is None:
            return
        version = self._version(device)
        device.heeds = told.assignment == version
        silent = device.told_s is None or now - device.told_s >= _AGAIN_S
        if not device.heeds and silent:
            self._owed[key] = None
        measured = device.meter.add(told, now, version)
        if measured is None or self._figures.fleet.held(uplink.device):
            return
        if (choice := device.governor.decide(measured, self._clock(), self._accuracies(now))) is not None:
            self._take(key, device, choice)

    def tick(self, now: float) -> None:
        """Tell devices what they are owed, and show how many go by what."""
        if not self._link.active:
            self._told_fence = -1
            return
        if self._told_fence != self._link.fence:  # a broker may have lost what it retained
            self._told_fence = self._link.fence
            self._owed.update(dict.fromkeys(self._records))
        for key in list(self._owed)[:_AT_ONCE]:
            device = self._device(key)
            if device is not None and not self._tell(key, device, now):
                break
            del self._owed[key]
        self._show()

    def shown(self, tier: str, name: str) -> AssignedView | None:
        """What was chosen for a device, for page and metrics; None where nothing was."""
        known = self._records.get((tier, name))
        if not known:
            return None
        record, device = known[-1][1], self._devices.get((tier, name))
        return AssignedView(
            words=str(Setting.of_record(record)),
            why=record.why,
            since_unix_s=record.unix_s,
            advised="" if record.advised == tier else record.advised,
            heeded=device is not None and device.heeds,
        )

    # --- inside --------------------------------------------------------------------------------------

    def _device(self, key: tuple[str, str]) -> _Device | None:
        """A device as it is judged by today's plan; None where nothing can be chosen for it."""
        plan, known = self._job.plan, self._devices.get(key)
        if known is not None and known.revision == plan.revision:
            return known
        choices = Choices.of(key[0], plan, self._tuning.tiers) if key[0] in plan.tiers else None
        if choices is None:
            return None
        if known is None:
            if len(self._devices) >= self._most:  # made again from its records, should it speak again
                del self._devices[next(iter(self._devices))]
            governor = Governor(choices, self._tuning)
            known = _Device(governor=governor, meter=Meter(self._tuning.window_h * _HOUR_S))
            for offset, record in self._records.get(key, ()):
                governor.apply(record)
                known.record, known.offset = record, offset
            self._devices[key] = known
        known.governor.choices, known.revision = choices, plan.revision
        if known.record is None:
            known.governor.setting = choices.own
        elif (misfit := known.governor.misfit()) is not None:
            self._take(key, known, misfit)
        return known

    def _take(self, key: tuple[str, str], device: _Device, choice: Choice) -> None:
        """Journal a choice; nothing is told that is not in the journal."""
        (tier, name), setting = key, choice.setting
        record = AssignmentRecord(
            tier=tier,
            device=name,
            unix_s=self._clock(),
            what=choice.what,
            up=choice.up,
            batch_size=setting.batch_size,
            max_tokens=setting.max_tokens,
            sampling=setting.rung.sampling,
            codec=setting.rung.codec,
            advised=setting.advised,
            why=choice.why,
        )
        try:
            offset = self._journal.append(RecordKind.ASSIGNMENT.value, msgspec.json.encode(record), tier=tier)
        except StateError as exc:
            _log.error("%s; nothing is chosen for device %s until it can be journaled", exc, name)
            return
        device.governor.apply(record)
        device.record, device.offset = record, offset
        self._records.setdefault(key, []).append((offset, record))
        self._owed[key] = None
        self._figures.metrics.chosen.labels(tier, _CHOSEN[choice.what]).inc()
        what = f"tier {setting.advised} is advised" if choice.what is Quantity.TIER else str(setting)
        _log.info(
            "device %s (%s): %s, for %s", name, tier, what, choice.why, extra={"device": name, "tier": tier}
        )

    def _tell(self, key: tuple[str, str], device: _Device, now: float) -> bool:
        tier, name = key
        setting, version = device.governor.setting, self._version(device)
        told = setting.assignment(run=self._journal.run, version=version, fence=self._link.fence)
        payload = self._signer.assignment(told, tier, name)
        device.told_s = now
        return self._downlink.send(self._topics.assignment(tier, name), payload, retain=True, tier=tier)

    def _version(self, device: _Device) -> int:
        """By which a device names what it is to go by; 0 for its tier's own way."""
        return self._journal.version_base + device.offset if device.record is not None else 0

    def _accuracies(self, now: float) -> Mapping[str, Accuracy]:
        """By tier; summed up over the fleet now and then only."""
        if self._summed_s is None or now - self._summed_s >= _SUM_UP_S:
            self._summed_s = now
            self._by_tier = {
                tier: Accuracy(one.accuracy, one.evaluation_samples)
                for tier, one in self._figures.fleet.summaries(now).items()
                if one.accuracy is not None
            }
        return self._by_tier

    def _show(self) -> None:
        metrics = self._figures.metrics
        assigned = Counter(tier for tier, _ in self._records)
        advised = Counter(key[0] for key, known in self._records.items() if known[-1][1].advised != key[0])
        unheeding = Counter(key[0] for key, one in self._devices.items() if not one.heeds)
        for tier in self._job.plan.tiers:
            metrics.assigned.labels(tier).set(assigned[tier])
            metrics.advised.labels(tier).set(advised[tier])
            metrics.unheeding.labels(tier).set(unheeding[tier])
