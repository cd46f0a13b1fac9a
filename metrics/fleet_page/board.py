"""Where the trainer's thread leaves what it knows of its fleet, and page and scrape pick it up.

Entries are made anew only for devices that said something, so a large, quiet fleet costs little; and whoever
saw revision n is given what changed after it.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from metrics.accounts import account
from metrics.fleet_page.fleet import Device, Fleet, TierSummary, outbox_fill
from metrics.fleet_page.history import History
from metrics.fleet_page.view import DeviceView, FleetView, Point, RefusalView, TierView, TrainerView
from sidestream.contract.messages import Telemetry
from sidestream.contract.quality import HEADLINE, Tally
from sidestream.contract.tasks import Task

MAX_REFUSALS: Final = 50
QUARANTINED: Final = "quarantined"
"""What a device is whose batches are kept and not learnt from, whatever it is up to."""


class Board:
    """Update from one thread, look from any.

    Args:
        job: The job's name.
        unix_s: The time.
        task: What the job learns: its headline measure is what devices are shown by.
    """

    def __init__(self, job: str, *, unix_s: float, task: Task = Task.TEXT_CLASSIFICATION) -> None:
        self.task = task
        """May be changed by the thread that updates, before any device has measured."""
        self._job = job
        self._id = secrets.token_hex(8)
        self._started_unix_s = self._now_unix_s = unix_s
        self._lock = threading.Lock()
        self._revision = 0
        self._shrunk_at = 0
        # By device what was last seen of it, and what is shown: made anew only where the former changes.
        self._devices: dict[tuple[str, str], tuple[tuple[float, str, bool], DeviceView]] = {}
        self._trainer = TrainerView()
        self._tiers: tuple[TierView, ...] = ()
        self._fleet = TierView(name="")
        self._history = History()
        self._refusals: deque[RefusalView] = deque(maxlen=MAX_REFUSALS)
        self._refused_at = 0

    def update(
        self,
        fleet: Fleet,
        summaries: Mapping[str, TierSummary],
        trainer: TrainerView,
        *,
        now: float,
        unix_s: float,
        held: Callable[[str], bool] = lambda device: False,
    ) -> None:
        """Take in the fleet as it is ``now``, on the fleet's clock; ``held`` devices are in quarantine."""
        states: dict[str, Counter[str]] = {tier: Counter() for tier in summaries}
        with self._lock:
            self._revision += 1
            self._now_unix_s = unix_s
            known = {(entry.tier, entry.name) for entry in fleet.by_age()}
            for key in self._devices.keys() - known:
                del self._devices[key]
                self._shrunk_at = self._revision
            for entry in fleet.by_age():
                key, online = (entry.tier, entry.name), fleet.online(entry, now)
                state = QUARANTINED if held(entry.name) else fleet.state(entry, now).value
                states[entry.tier][state] += 1
                seen = (entry.heard, state, online)
                if key not in self._devices or self._devices[key][0] != seen:
                    heard_unix_s = round(unix_s - (now - entry.heard), 1)
                    self._devices[key] = seen, self._device(entry, state, online, heard_unix_s)
            self._trainer = trainer
            self._tiers = tuple(
                _tier(tier, summary, states[tier], trainer.loss.get(tier), self._quality(summary))
                for tier, summary in summaries.items()
            )
            whole, losses = fleet.summary(now), [tier.loss for tier in self._tiers if tier.loss is not None]
            loss = sum(losses) / len(losses) if losses else None
            self._fleet = _tier("", whole, sum(states.values(), Counter()), loss, self._quality(whole))
            self._history.add(self._point(unix_s))

    def refuse(self, refusal: RefusalView) -> None:
        """Note a refused message."""
        with self._lock:
            self._revision += 1
            self._refusals.appendleft(refusal)
            self._refused_at = self._revision

    def view(self, *, board: str = "", since: int = 0) -> FleetView:
        """Everything; or, for who names this board and a revision of it, what is new."""
        with self._lock:
            least = max(self._shrunk_at, self._history.thinned_at)
            whole = board != self._id or not least <= since <= self._revision
            since = -1 if whole else since
            return FleetView(
                job=self._job,
                board=self._id,
                revision=self._revision,
                now_unix_s=self._now_unix_s,
                started_unix_s=self._started_unix_s,
                measure=HEADLINE[self.task],
                trainer=self._trainer,
                fleet=self._fleet,
                tiers=self._tiers,
                whole=whole,
                devices=tuple(one for _, one in self._devices.values() if one.revision > since),
                points=tuple(one for one in self._history.points if one.revision > since),
                refusals=tuple(self._refusals) if self._refused_at > since else None,
            )

    def oldest(self, most: int) -> tuple[list[DeviceView], int]:
        """The ``most`` devices that have been known longest, and how many more there are."""
        with self._lock:
            devices = [view for _, view in self._devices.values()]
        return devices[:most], max(0, len(devices) - most)

    def _headline(self, tally: Tally | None) -> float | None:
        """The measure that the task is judged by first; None if it is not known, or not defined."""
        value = (tally or Tally()).measures(self.task).get(HEADLINE[self.task])
        return value if value is not None and math.isfinite(value) else None

    def _quality(self, told: Telemetry | TierSummary) -> float | None:
        """The headline; of agents that do not count yet, their accuracy where that is the headline."""
        quality = self._headline(told.tally)
        return told.accuracy if quality is None and HEADLINE[self.task] == "accuracy" else quality

    def _device(self, device: Device, state: str, online: bool, heard_unix_s: float) -> DeviceView:
        known = DeviceView(
            tier=device.tier,
            name=device.name,
            state=state,
            online=online,
            heard_unix_s=heard_unix_s,
            reason=device.reason,
            software=device.software,
            revision=self._revision,
        )
        told = device.telemetry
        if told is None:
            return known
        quality, taken = self._quality(told), account(told)
        return msgspec.structs.replace(
            known,
            samples_read=taken.read,
            samples=taken.forwarded,
            samples_unused=taken.unused,
            unused_why=taken.reasons,
            account=str(taken),
            samples_dropped=told.samples_dropped,
            samples_lost=told.samples_lost,
            batches_refused=told.batches_refused,
            bytes_up=told.bytes_up,
            bytes_down=told.bytes_down,
            outbox_bytes=told.outbox_bytes,
            outbox_fill=round(outbox_fill(told), 3),
            weights_version=told.weights_version,
            quality=None if quality is None else round(quality, 4),
            evaluation_samples=told.evaluation_samples,
            rss_bytes=told.rss_bytes,
            temperature_celsius=told.temperature_celsius,
        )

    def _point(self, unix_s: float) -> Point:
        trainer = self._trainer
        return Point(
            at_unix_s=round(unix_s, 1),
            samples=trainer.samples,
            messages=trainer.messages,
            refused=sum(one.count for one in trainer.refused),
            bytes_up=trainer.bytes_up,
            bytes_down=trainer.bytes_down,
            online=self._fleet.online,
            loss={tier.name: round(tier.loss, 4) for tier in self._tiers if tier.loss is not None},
            quality={tier.name: round(tier.quality, 4) for tier in self._tiers if tier.quality is not None},
            revision=self._revision,
        )


def _tier(
    name: str, summary: TierSummary, states: Counter[str], loss: float | None, quality: float | None
) -> TierView:
    taken = account(summary.counts)
    return TierView(
        name=name,
        states=dict(states),
        online=summary.devices_online,
        samples_read=taken.read,
        samples=taken.forwarded,
        samples_unused=taken.unused,
        unused_why=taken.reasons,
        account=str(taken),
        samples_dropped=summary.counts["samples_dropped"],
        samples_lost=summary.counts["samples_lost"],
        bytes_up=summary.counts["bytes_up"],
        bytes_down=summary.counts["bytes_down"],
        outbox_bytes=summary.outbox_bytes,
        version_min=summary.version_min,
        version_max=summary.version_max,
        quality=quality,
        evaluation_samples=summary.evaluation_samples,
        loss=loss,
        probe_accuracy=None if summary.probe_accuracy is None else round(summary.probe_accuracy, 4),
    )
