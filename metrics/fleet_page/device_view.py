"""From what a device says, and what is known of it, to what is shown of it. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import msgspec

from metrics.accounts import account
from metrics.fleet_page.fleet import Device
from metrics.fleet_page.summary import TierSummary, outbox_fill
from metrics.fleet_page.troubles import SEVERE, TITLES
from metrics.fleet_page.view import (
    AssignedView,
    ConfusionView,
    DeviceView,
    EventView,
    LabelsView,
    LabelView,
    TierView,
    TroubleView,
)
from sidestream.contract.messages import Telemetry
from sidestream.contract.quality import HEADLINE, Tally
from sidestream.contract.tasks import Task

_MOST_PAIRS = 50


def quality_of(task: Task, told: Telemetry | TierSummary) -> float | None:
    """The task's headline; of agents that do not count yet, their accuracy where that is the headline."""
    value = (told.tally or Tally()).headline(task)
    if value is not None and math.isfinite(value):
        return value
    return told.accuracy if HEADLINE[task] == "accuracy" else None


def device_view(
    device: Device,
    *,
    state: str,
    online: bool,
    heard_unix_s: float,
    troubles: tuple[TroubleView, ...],
    task: Task,
    assigned: AssignedView | None = None,
    revision: int,
) -> DeviceView:
    """What is shown of a device."""
    known = DeviceView(
        tier=device.tier,
        name=device.name,
        state=state,
        online=online,
        heard_unix_s=heard_unix_s,
        reason=device.reason,
        software=device.software,
        troubles=troubles,
        certificate_expires_unix_s=device.certificate_expires_unix_s,
        backbone_fingerprint=device.fingerprint,
        assigned=assigned,
        revision=revision,
    )
    return known if device.telemetry is None else _told(known, device, device.telemetry, task)


def _told(known: DeviceView, device: Device, told: Telemetry, task: Task) -> DeviceView:
    quality, taken = quality_of(task, told), account(told)
    return msgspec.structs.replace(
        known,
        samples_read=taken.read,
        samples=taken.forwarded,
        samples_held_out=taken.held_out,
        samples_waiting=taken.waiting,
        samples_unused=taken.unused,
        left_out={why: count for count, why in taken.left_out},
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
        final_only=told.final_only,
        quality=None if quality is None else round(quality, 4),
        evaluation_samples=told.evaluation_samples,
        rss_bytes=told.rss_bytes,
        peak_rss_bytes=told.peak_rss_bytes,
        temperature_celsius=told.temperature_celsius,
        receipt_s=told.receipt_s,
        reconnects=told.reconnects,
        clock_off_s=round(device.clock_off_s, 1),
    )


def trouble_views(
    found: Mapping[str, str], before: tuple[TroubleView, ...], since_unix_s: float
) -> tuple[TroubleView, ...]:
    """Troubles with the time since when: what was there before has been there since then."""
    known = {one.kind: one.since_unix_s for one in before}
    return tuple(
        TroubleView(
            kind=kind,
            title=TITLES[kind],
            words=words,
            severe=kind in SEVERE,
            since_unix_s=round(known.get(kind, since_unix_s), 1),
        )
        for kind, words in found.items()
    )


def news_of(before: DeviceView | None, now: DeviceView, at_unix_s: float) -> list[tuple[EventView, bool]]:
    """What happened to a device between two looks, each with whether it is minor."""

    def event(kind: str, words: str) -> EventView:
        return EventView(
            at_unix_s=round(at_unix_s, 1),
            kind=kind,
            words=words,
            tier=now.tier,
            device=now.name,
            revision=now.revision,
        )

    found: list[tuple[EventView, bool]] = []
    if before is None or before.state != now.state:
        found.append(
            (event("state", f"is {now.state}" if before is None else f"{before.state} → {now.state}"), False)
        )
    old, new = ({one.kind: one for one in (() if view is None else view.troubles)} for view in (before, now))
    found += [
        (event(kind, f"{one.title}: {one.words}"), False) for kind, one in new.items() if kind not in old
    ]
    found += [
        (event("well", f"no longer: {one.title}"), False) for kind, one in old.items() if kind not in new
    ]
    if now.weights_version and (before is None or before.weights_version != now.weights_version):
        found.append((event("version", f"uses version {now.weights_version}"), True))
    chosen = now.assigned
    if chosen is not None and (before is None or _since(before.assigned) != chosen.since_unix_s):
        advice = f"; tier {chosen.advised} is advised" if chosen.advised else ""
        found.append((event("assigned", f"{chosen.words}{advice}: {chosen.why}"), before is None))
    return found


def _since(assigned: AssignedView | None) -> float | None:
    return None if assigned is None else assigned.since_unix_s


def tier_view(
    name: str, summary: TierSummary, states: Counter[str], loss: float | None, quality: float | None
) -> TierView:
    """What is shown of a tier, or of the whole fleet."""
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


def labels_view(names: tuple[str, ...], tally: Tally) -> LabelsView | None:
    """Which labels are hard; None where they are not counted, or are others than the job's."""
    counts = tally.by_label()
    if not counts or len(counts) != len(names):
        return None
    return LabelsView(
        labels=tuple(
            LabelView(name=name, actual=one.actual, answered=one.answered, right=one.right)
            for name, one in zip(names, counts, strict=True)
        ),
        confused=tuple(
            ConfusionView(actual=names[one.actual], answered=names[one.answered], count=one.times)
            for one in tally.confusions()[:_MOST_PAIRS]
            if max(one.actual, one.answered) < len(names)
        ),
    )
