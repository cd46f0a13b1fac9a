"""What the fleet page and ``sidestream top`` show: plain data, the same over HTTP and in a process.

Pure. Times are Unix seconds; counters run over the life of an outbox (devices) or of the trainer.
"""

from __future__ import annotations

import msgspec

from sidestream.contract.wire import prepared


@prepared
class TroubleView(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is the matter with a device."""

    kind: str
    """One of :data:`metrics.fleet_page.troubles.TITLES`."""
    title: str
    """What it is called."""
    words: str
    """What is known of it."""
    severe: bool
    """Whether nothing of the device is learnt because of it."""
    since_unix_s: float
    """Since when."""


@prepared
class AssignedView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the trainer chose for a device."""

    words: str
    """How it is to make its batches."""
    why: str
    """Why this was chosen last."""
    since_unix_s: float
    """Since when."""
    advised: str = ""
    """The tier that it would do better in; empty for its own."""
    heeded: bool = False
    """Whether the device says that it goes by that."""


@prepared
class DeviceView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device."""

    tier: str
    """Its hardware tier."""
    name: str
    """Its id."""
    state: str
    """As :class:`metrics.fleet_page.fleet.State` has it, or :data:`metrics.fleet_page.board.QUARANTINED`."""
    heard_unix_s: float
    """When it last said something."""
    online: bool = False
    """Whether it is there."""
    reason: str = ""
    """Why it is not there, in its own words or its will's."""
    software: str = ""
    """The agent's version."""
    samples_read: int = 0
    """Samples it took from its source."""
    samples: int = 0
    """Samples passed through its backbone for training."""
    samples_unused: int = 0
    """Samples it read and can do nothing with: they were unreadable, or skipped."""
    unused_why: str = ""
    """How many of those for which reason."""
    account: str = ""
    """What became of the samples read, in words."""
    samples_dropped: int = 0
    """Samples that its full outbox dropped."""
    samples_lost: int = 0
    """Samples receipted before the trainer's journal was set back, and gone from the device since."""
    batches_refused: int = 0
    """Batches of its that the trainer refused."""
    bytes_up: int = 0
    """Payload bytes published."""
    bytes_down: int = 0
    """Payload bytes received."""
    outbox_bytes: int = 0
    """What waits for a receipt."""
    outbox_fill: float = 0.0
    """How full the outbox is, 0 to 1."""
    weights_version: int = 0
    """In use."""
    final_only: bool = False
    """Whether it wants finished versions only."""
    quality: float | None = None
    """That version's figure of merit on held-out samples."""
    evaluation_samples: int = 0
    """How many those are."""
    rss_bytes: int = 0
    """Resident memory of the agent."""
    temperature_celsius: float | None = None
    """Of the board."""
    troubles: tuple[TroubleView, ...] = ()
    """What is the matter with it, the worst first."""
    samples_held_out: int = 0
    """Samples that measure there."""
    samples_waiting: int = 0
    """Samples that wait for a label."""
    left_out: dict[str, int] = {}
    """Samples that are not used, by reason."""
    peak_rss_bytes: int = 0
    """The most that the agent ever took."""
    receipt_s: float | None = None
    """From a batch's first publish to its receipt, of late."""
    reconnects: int = 0
    """Connections to the broker after the first."""
    clock_off_s: float = 0.0
    """How far its clock is ahead."""
    certificate_expires_unix_s: float = 0.0
    """When its certificate ends; 0 without one."""
    backbone_fingerprint: str = ""
    """Of its backbone."""
    assigned: AssignedView | None = None
    """What was chosen for it; None where it goes by its tier's plan."""
    revision: int = 0
    """The board's revision that brought the last change."""


@prepared
class TierView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One tier, or the whole fleet."""

    name: str
    """The tier's; empty for the fleet."""
    states: dict[str, int] = {}
    """Known devices by state."""
    online: int = 0
    """How many of them are there."""
    samples_read: int = 0
    """Samples that devices took from their sources."""
    samples: int = 0
    """Samples passed through backbones for training."""
    samples_unused: int = 0
    """Samples read that devices can do nothing with."""
    unused_why: str = ""
    """How many of those for which reason."""
    account: str = ""
    """What became of the samples read, in words."""
    samples_dropped: int = 0
    """Samples that full outboxes dropped."""
    samples_lost: int = 0
    """Samples receipted before the trainer's journal was set back, and gone from devices since."""
    bytes_up: int = 0
    """Payload bytes published by devices."""
    bytes_down: int = 0
    """Payload bytes received by devices."""
    outbox_bytes: int = 0
    """What waits in outboxes."""
    version_min: int | None = None
    """Oldest version in use on a device that is there."""
    version_max: int | None = None
    """Newest."""
    quality: float | None = None
    """Mean figure of merit, weighted by evaluation samples."""
    evaluation_samples: int = 0
    """How many those are."""
    loss: float | None = None
    """Exponential mean of the loss of all that is learnt."""
    probe_accuracy: float | None = None
    """What the linear starts alone have of these samples, as a yardstick."""


@prepared
class RefusedView(msgspec.Struct, frozen=True, kw_only=True):
    """Refused messages of one kind and reason."""

    kind: str
    """``activations``, ``status`` or ``telemetry``."""
    reason: str
    """As :class:`metrics.catalogue.Reason` has it."""
    count: int
    """How many."""


@prepared
class RefusalView(msgspec.Struct, frozen=True, kw_only=True):
    """One refused message: why, never what."""

    at_unix_s: float
    """When."""
    tier: str
    """Of its topic."""
    device: str
    """Of its topic."""
    kind: str
    """As above."""
    reason: str
    """For people."""


@prepared
class AnswersView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """In a split job: how the trainer and the devices answer one another."""

    waiting: int = 0
    """Batches that wait to be served."""
    outstanding: int = 0
    """Answers that devices have not dealt with."""
    expired: int = 0
    """Answers taken back because nobody wanted them."""
    gradient_norm: float = 0.0
    """Of the last update, before it was clipped."""
    staleness: int = 0
    """Batches served between the last one that a device answered and that answer."""
    bytes_down: int = 0
    """Payload bytes of answers."""
    backward_passes: int = 0
    """On devices."""
    reused: int = 0
    """Batches whose earlier activations stood for them."""
    changed: int = 0
    """Batches of which only their activations' change was sent."""
    lost: int = 0
    """Steps of devices' own adapters that came into no average."""


@prepared
class TrainerView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The trainer."""

    connected: bool = False
    """Whether it has its broker."""
    version: int = 0
    """Journal records folded in."""
    published: int = 0
    """The version that devices were sent last."""
    finished: int = 0
    """The version for devices that want finished ones only."""
    backlog: int = 0
    """Records not folded in yet."""
    final: bool = False
    """Nothing is left to learn."""
    samples: int = 0
    """Distinct samples in the journal."""
    messages: int = 0
    """Batches received."""
    duplicates: int = 0
    """Of those, journaled before."""
    refused: tuple[RefusedView, ...] = ()
    """Messages refused, those with a count."""
    bytes_up: int = 0
    """Payload bytes of batches received."""
    bytes_down: int = 0
    """Payload bytes published."""
    inbox_dropped: int = 0
    """Messages that found the inbox full."""
    loss: dict[str, float] = {}
    """By tier."""
    passes: float = 0.0
    """Passes over the journal that are made while nothing arrives."""
    owed_rows: int = 0
    """Rows that those passes still owe."""
    answers: AnswersView | None = None
    """Of a split job."""


@prepared
class EventView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that happened."""

    at_unix_s: float
    """When; where it happened often, when it last did."""
    kind: str
    """A kind of trouble, ``well`` when one has passed, or ``state``, ``version``, ``refused``, ``labels``,
    ``assigned``, ``trainer``."""
    words: str
    """What."""
    tier: str = ""
    """Of the device."""
    device: str = ""
    """To which; empty for the trainer."""
    count: int = 1
    """How often."""
    revision: int = 0
    """The board's revision that brought it."""


@prepared
class DeviceDetail(msgspec.Struct, frozen=True, kw_only=True):
    """One device at length."""

    device: DeviceView | None
    """None if there is none of that name."""
    events: tuple[EventView, ...]
    """The last ten, the newest first."""


@prepared
class LabelView(msgspec.Struct, frozen=True, kw_only=True):
    """How a label fares on held-out samples of devices that are there."""

    name: str
    """The label."""
    actual: int
    """How often it was true."""
    answered: int
    """How often it was answered."""
    right: int
    """How often rightly."""


@prepared
class ConfusionView(msgspec.Struct, frozen=True, kw_only=True):
    """One label that was taken for another."""

    actual: str
    """The true one."""
    answered: str
    """The one that was answered."""
    count: int
    """How often."""


@prepared
class LabelsView(msgspec.Struct, frozen=True, kw_only=True):
    """Which labels are hard."""

    labels: tuple[LabelView, ...]
    """All of them, in the job's order."""
    confused: tuple[ConfusionView, ...]
    """The pairs that are confused most often, the most frequent first; rare ones may be missing."""


@prepared
class Point(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fleet at one moment, for curves. Counters, so that rates are differences over any distance."""

    at_unix_s: float
    """When."""
    samples: int = 0
    """As in :class:`TrainerView`."""
    messages: int = 0
    """Likewise."""
    refused: int = 0
    """Messages refused."""
    bytes_up: int = 0
    """Likewise."""
    bytes_down: int = 0
    """Likewise."""
    online: int = 0
    """Devices that are there."""
    loss: dict[str, float] = {}
    """By tier."""
    quality: dict[str, float] = {}
    """By tier."""
    versions: dict[str, int] = {}
    """By tier, the newest version in use on a device that is there: what ``quality`` is of."""
    revision: int = 0
    """The board's revision that brought it."""


@prepared
class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything, or what has changed since a revision."""

    job: str
    """The job's name."""
    board: str
    """The board's id; revisions of another one mean nothing."""
    revision: int
    """Ask for what is new after this."""
    now_unix_s: float
    """The server's clock."""
    started_unix_s: float
    """When the board began."""
    measure: str
    """What the figures of merit are, such as ``accuracy``."""
    trainer: TrainerView
    """The trainer."""
    fleet: TierView
    """All tiers together."""
    tiers: tuple[TierView, ...]
    """By name."""
    whole: bool
    """Devices and points are all there are; otherwise those that changed, or are new."""
    devices: tuple[DeviceView, ...]
    """By age."""
    points: tuple[Point, ...]
    """Oldest first."""
    refusals: tuple[RefusalView, ...] | None
    """The newest first; None if there are no new ones."""
    events: tuple[EventView, ...] = ()
    """What happened since, the oldest first."""
    labels: LabelsView | None = None
    """None where a task has no labels, and where nothing has changed."""
