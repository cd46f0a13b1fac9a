"""Where the trainer's thread leaves what it knows of its fleet, and page and scrape pick it up.

Entries are made anew only for devices that said something, so a large, quiet fleet costs little; and whoever
saw revision n is given what changed after it.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from metrics.fleet_page.device_view import (
    device_view,
    labels_view,
    news_of,
    quality_of,
    tier_view,
    trouble_views,
)
from metrics.fleet_page.events import EventLog
from metrics.fleet_page.fleet import Device, Fleet, State
from metrics.fleet_page.history import History
from metrics.fleet_page.summary import TierSummary, together
from metrics.fleet_page.troubles import Circumstances, Held, troubles_of
from metrics.fleet_page.versions import VersionTimes
from metrics.fleet_page.view import (
    AssignedView,
    DeviceDetail,
    DeviceView,
    EventView,
    FleetView,
    LabelsView,
    Point,
    RefusalView,
    TierView,
    TrainerView,
)
from sidestream.contract.quality import HEADLINE
from sidestream.contract.tasks import Task

QUARANTINED: Final = "quarantined"
"""What a device is whose batches are kept and not learnt from, whatever it is up to."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a fleet is seen against."""

    held: Held = lambda device: None
    """Why a device is in quarantine; None if it is not."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of the backbones of tiers that are settled."""
    labels: tuple[str, ...] = ()
    """The job's."""
    assigned: Callable[[str, str], AssignedView | None] = lambda tier, device: None
    """What was chosen for a device."""


class _Shown:
    """What was shown last: replaced whole, revision by revision."""

    def __init__(self) -> None:
        # By device what was last seen of it, and what is shown: made anew only where the former changes.
        self.devices: dict[tuple[str, str], tuple[object, DeviceView]] = {}
        self.shrunk_at = 0
        """When a device was last taken off."""
        self.trainer = TrainerView()
        self.tiers: tuple[TierView, ...] = ()
        self.fleet = TierView(name="")
        self.labels: LabelsView | None = None
        self.labels_at = 0
        """When the labels' figures last changed."""


@dataclass
class _Changes:
    """What an update brings."""

    revision: int
    """Of the board, once it is there."""
    states: dict[str, Counter[str]]
    """By tier, how many devices are in which state."""
    devices: dict[tuple[str, str], tuple[object, DeviceView]] = field(default_factory=dict)
    """Those that are not as they were."""
    news: list[tuple[EventView, bool]] = field(default_factory=list)
    """What happened, and whether it is minor."""


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
        self._shown = _Shown()
        self._versions = VersionTimes()
        self._finished = VersionTimes()  # for devices that want no others
        self._history = History()
        self._log = EventLog()

    def update(
        self,
        fleet: Fleet,
        summaries: Mapping[str, TierSummary],
        trainer: TrainerView,
        *,
        now: float,
        unix_s: float,
        around: Surroundings = Surroundings(),
    ) -> None:
        """Take in the fleet as it is ``now``, on the fleet's clock.

        Whoever looks waits while what has changed is put in its place, and not while that is worked out.
        """
        self._now_unix_s = unix_s
        self._versions.note(trainer.published, now)
        self._finished.note(trainer.finished, now)
        changes = _Changes(self._revision + 1, {tier: Counter[str]() for tier in summaries})
        self._look_at_devices(fleet, changes, now, around)
        whole = together(summaries.values())
        tiers = tuple(
            tier_view(
                *(tier, summary, changes.states[tier]),
                *(trainer.loss.get(tier), quality_of(self.task, summary)),
            )
            for tier, summary in summaries.items()
        )
        losses = [tier.loss for tier in tiers if tier.loss is not None]
        loss = sum(losses) / len(losses) if losses else None
        every = sum(changes.states.values(), Counter[str]())
        total = tier_view("", whole, every, loss, quality_of(self.task, whole))
        labels = labels_view(around.labels, whole.tally)
        with self._lock:
            self._revision, shown = changes.revision, self._shown
            self._take(fleet, changes)
            self._take_trainer(trainer)
            shown.tiers, shown.fleet = tiers, total
            if labels != shown.labels:
                shown.labels, shown.labels_at = labels, self._revision
            self._history.add(self._point(unix_s))

    def refuse(self, refusal: RefusalView) -> None:
        """Note a refused message."""
        with self._lock:
            self._revision += 1
            known = (refusal.tier, refusal.device) in self._shown.devices
            self._log.refuse(refusal, self._revision, known=known)

    def tell(self, kind: str, words: str) -> None:
        """Something happened to the job as a whole."""
        with self._lock:
            self._revision += 1
            self._note(kind, words)

    def view(self, *, board: str = "", since: int = 0) -> FleetView:
        """Everything; or, for who names this board and a revision of it, what is new."""
        with self._lock:
            shown, log = self._shown, self._log
            least = max(shown.shrunk_at, self._history.restarted_at)
            whole = board != self._id or not least <= since <= self._revision
            since = -1 if whole else since
            return FleetView(
                job=self._job,
                board=self._id,
                revision=self._revision,
                now_unix_s=self._now_unix_s,
                started_unix_s=self._started_unix_s,
                measure=HEADLINE[self.task],
                trainer=shown.trainer,
                fleet=shown.fleet,
                tiers=shown.tiers,
                whole=whole,
                devices=tuple(one for _, one in shown.devices.values() if one.revision > since),
                points=tuple(one for one in self._history.points if one.revision > since),
                refusals=tuple(log.refusals) if log.refused_at > since else None,
                events=log.since(since),
                labels=shown.labels if shown.labels_at > since else None,
            )

    def detail(self, tier: str, name: str) -> DeviceDetail:
        """One device at length."""
        with self._lock:
            _, found = self._shown.devices.get((tier, name), (None, None))
            return DeviceDetail(device=found, events=self._log.of(tier, name))

    def newest(self) -> tuple[Point, str, int]:
        """The last point of the curves, what their quality is, and the version folded by then."""
        with self._lock:
            return self._point(self._now_unix_s), HEADLINE[self.task], self._shown.trainer.version

    def oldest(self, most: int) -> tuple[list[DeviceView], int]:
        """The ``most`` devices that have been known longest, and how many more there are."""
        with self._lock:
            devices = [view for _, view in self._shown.devices.values()]
        return devices[:most], max(0, len(devices) - most)

    # --- on the thread that updates ------------------------------------------------------------------

    def _look_at_devices(self, fleet: Fleet, changes: _Changes, now: float, around: Surroundings) -> None:
        """Make anew what is shown of devices that are not as they were; count all by state."""
        for entry in fleet.by_age():
            key = entry.tier, entry.name
            presence = fleet.presence(entry, now)
            held, refusal = around.held(entry.name), self._log.last_refusal(*key)
            assigned = around.assigned(*key)
            state = presence[0].value if held is None else QUARANTINED
            changes.states[entry.tier][state] += 1
            seen = (entry.heard, state, presence, refusal, held, assigned)
            before = self._shown.devices.get(key)
            if before is None or before[0] != seen:
                about = self._circumstances(entry, presence, now, around.fingerprints, held, refusal)
                old = None if before is None else before[1]
                view = self._device_view(entry, state, about, assigned, old, changes.revision)
                changes.devices[key] = seen, view
                changes.news += news_of(old, view, self._now_unix_s)

    def _circumstances(
        self,
        entry: Device,
        presence: tuple[State, bool],
        now: float,
        fingerprints: Mapping[str, str],
        held: str | None,
        refusal: RefusalView | None,
    ) -> Circumstances:
        told = entry.telemetry
        version = told.weights_version if told is not None else None
        times = self._finished if told is not None and told.final_only else self._versions
        return Circumstances(
            state=presence[0],
            online=presence[1],
            now=now,
            unix_s=self._now_unix_s,
            fingerprint=fingerprints.get(entry.tier, ""),
            held=held,
            refusal=refusal,
            outdated_s=times.outdated_s(version, now),
        )

    def _device_view(
        self,
        entry: Device,
        state: str,
        about: Circumstances,
        assigned: AssignedView | None,
        before: DeviceView | None,
        revision: int,
    ) -> DeviceView:
        heard_unix_s = round(self._now_unix_s - (about.now - entry.heard), 1)
        since_unix_s = heard_unix_s if about.state in (State.LOST, State.SILENT) else self._now_unix_s
        found = troubles_of(entry, about)
        return device_view(
            entry,
            state=state,
            online=about.online,
            heard_unix_s=heard_unix_s,
            troubles=trouble_views(found, before.troubles if before is not None else (), since_unix_s),
            task=self.task,
            assigned=assigned,
            revision=revision,
        )

    # --- with the lock -----------------------------------------------------------------------------------

    def _take(self, fleet: Fleet, changes: _Changes) -> None:
        for key in self._shown.devices.keys() - fleet.known:
            del self._shown.devices[key]
            self._log.forget(*key)
            self._shown.shrunk_at = self._revision
        self._shown.devices.update(changes.devices)
        for event, minor in changes.news:
            self._log.note(event, minor=minor)

    def _take_trainer(self, trainer: TrainerView) -> None:
        before, self._shown.trainer = self._shown.trainer, trainer
        words = []
        if trainer.connected != before.connected:
            words.append("has its broker" if trainer.connected else "has lost its broker")
        if trainer.final != before.final:
            words.append("all is learnt" if trainer.final else "learns again: there is something new")
        for said in words:
            self._note("trainer", said)

    def _note(self, kind: str, words: str) -> None:
        at_unix_s = round(self._now_unix_s, 1)
        self._log.note(EventView(at_unix_s=at_unix_s, kind=kind, words=words, revision=self._revision))

    def _point(self, unix_s: float) -> Point:
        trainer, tiers = self._shown.trainer, self._shown.tiers
        return Point(
            at_unix_s=round(unix_s, 1),
            samples=trainer.samples,
            messages=trainer.messages,
            refused=sum(one.count for one in trainer.refused),
            bytes_up=trainer.bytes_up,
            bytes_down=trainer.bytes_down,
            online=self._shown.fleet.online,
            loss={tier.name: round(tier.loss, 4) for tier in tiers if tier.loss is not None},
            quality={tier.name: round(tier.quality, 4) for tier in tiers if tier.quality is not None},
            versions={tier.name: tier.version_max for tier in tiers if tier.version_max is not None},
            revision=self._revision,
        )
