"""What the journal holds beside what devices send, as JSON: facts of a job, and what was learnt when."""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

from side_trainer.settings.schema import LearnerSettings
from sidestream.contract.plan import FedMobiLLM, MethodPlan, SideNetworkSpec, TierFacts
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec
from sidestream.contract.wire import Message, prepared


class Quantity(str, enum.Enum):
    """What is chosen for a device."""

    BATCH_SIZE = "batch_size"
    MAX_TOKENS = "max_tokens"
    RUNG = "rung"
    """By which policy and codec it sends."""
    TIER = "tier"
    """Advice only: a device moves when its owner has it move."""
    BOUNDS = "bounds"
    """Everything that lay outside other bounds."""


class RecordKind(str, enum.Enum):
    """What a journal's records are."""

    SETTINGS = "settings"
    """:class:`SettingsRecord`"""
    LABELS = "labels"
    """:class:`LabelsRecord`"""
    TIER = "tier"
    """:class:`TierRecord`"""
    BATCH = "batch"
    """An ``ActivationBatch`` as it came over the wire, less the rows that had come before."""
    LEARN = "learn"
    """:class:`LearnRecord`"""
    IDLE = "idle"
    """:class:`IdleRecord`"""
    STEP = "step"
    """:class:`StepRecord`"""
    SNAPSHOT = "snapshot"
    """:class:`SnapshotRecord`"""
    REUSE = "reuse"
    """A ``Reuse`` as it came over the wire."""
    REPEAT = "repeat"
    """:class:`RepeatRecord`"""
    SERVE = "serve"
    """:class:`ServeRecord`"""
    UPDATE = "update"
    """An ``AdapterGradient`` as it came over the wire."""
    UPLOAD = "upload"
    """An ``AdapterUpload`` as it came over the wire."""
    ROUND = "round"
    """:class:`RoundRecord`"""
    ASSIGNMENT = "assignment"
    """:class:`AssignmentRecord`"""


FACTS: Final = frozenset({RecordKind.SETTINGS, RecordKind.LABELS, RecordKind.TIER})
"""Kinds that fix what a job is, whatever its method."""


@prepared
class SettingsRecord(Message, frozen=True, kw_only=True):
    """Starts a journal, and stands wherever the operator changed a setting of the learner."""

    job: str
    """The job's name."""
    task: Task
    """What is learnt."""
    side_network: SideNetworkSpec
    """Never changes within a journal."""
    learner: LearnerSettings
    """In force for the records that follow."""
    method: MethodPlan = FedMobiLLM()
    """How the job learns."""
    device: str = "cpu"
    """On what kind of device is learnt what follows, cpu or cuda: each gives bits of its own."""


@prepared
class LabelsRecord(Message, frozen=True, kw_only=True):
    """Fixes the labels."""

    labels: tuple[str, ...]
    """In index order."""


@prepared
class TierRecord(TierFacts, frozen=True, kw_only=True):
    """Fixes what the first device of a tier showed."""

    tier: str
    """Its name."""
    backbone: str = ""
    """Where the trainer's settings say that it is, for exports."""


@prepared
class SnapshotRecord(Message, frozen=True, kw_only=True):
    """From here on the batches before a record are not drawn any more: the journal may let them go."""

    before: Annotated[int, msgspec.Meta(ge=1)]
    """The first record of which batches stay."""


@prepared
class RepeatRecord(Message, frozen=True, kw_only=True):
    """A batch that is to be answered, and of which every row had come before."""

    stream: str
    """Of the outbox that it came from,"""
    sequence: int
    """and its place there."""
    ticket: bytes
    """Its name."""
    slot: int
    """Where its device looks for the answer."""


@prepared
class ServeRecord(Message, frozen=True, kw_only=True):
    """Which batches are learnt from next, all of them in one update: so the order of service is data."""

    offsets: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    """Their records."""
    progress: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """The share of all passes that is done, by which the learning rate falls."""


@prepared
class RoundRecord(Message, frozen=True, kw_only=True):
    """Ends a round of devices' own adapters: these uploads are averaged."""

    number: int
    """The round's."""
    uploads: tuple[int, ...]
    """Their records."""


@prepared
class LearnRecord(Message, frozen=True, kw_only=True):
    """An update on batches that came: so how many are learnt from together is data."""

    through: int
    """The record of the last of them. The first is the one that has waited longest."""


@prepared
class AssignmentRecord(Message, frozen=True, kw_only=True):
    """What was chosen for one device, and why. It changes no weights; a restart goes on from it."""

    tier: str
    """The device's."""
    device: str
    """Its id."""
    unix_s: float
    """When."""
    what: Quantity
    """Which quantity changed."""
    up: bool
    """Whether it costs the device more than before."""
    batch_size: int
    """Samples a message, from now on."""
    max_tokens: int
    """Where its samples are cut."""
    sampling: str
    """Its token-sampling policy."""
    codec: Codec
    """How its activations are quantised."""
    advised: str = ""
    """The tier that it would do better in; empty for its own."""
    why: str
    """In words."""


@prepared
class IdleRecord(Message, frozen=True, kw_only=True):
    """A slice of training over the journal while nothing arrives."""

    phase: int
    """The offset that the phase started at: its rows are those of the batches up to there."""
    position: Annotated[int, msgspec.Meta(ge=0)]
    """The slice's first row, counted over the phase's shuffled passes; in a split job batches are counted."""
    rows: Annotated[int, msgspec.Meta(ge=1)]
    """Rows in the slice."""
    total: Annotated[int, msgspec.Meta(ge=1)]
    """Rows that the whole phase is meant to train on: the learning rate falls over them."""


@prepared
class StepPart(Message, frozen=True, kw_only=True):
    """What one cell brings to a step."""

    through: Annotated[int, msgspec.Meta(ge=0)] = 0
    """As a :class:`LearnRecord` says; 0 for no batch."""
    idle: IdleRecord | None = None
    """A slice of its journal, if the step is one of idle training."""


@prepared
class StepRecord(Message, frozen=True, kw_only=True):
    """Updates that the trainers of all cells make together. Every cell's journal has every step."""

    number: Annotated[int, msgspec.Meta(ge=1)]
    """Counted from 1, alike in all cells."""
    after: Annotated[int, msgspec.Meta(ge=0)]
    """The number of this journal's step before: not the last one's where the journal has lost some."""
    parts: Annotated[tuple[StepPart, ...], msgspec.Meta(min_length=2)]
    """By cell; this journal's own among them."""

    @property
    def learns(self) -> bool:
        """Whether it learns from what came, and not from what is there."""
        return any(part.through for part in self.parts)


@prepared
class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """What the journal holds of one device's outbox."""

    device: str
    """The device that it belongs to."""
    stream: str
    """The outbox's id."""
    watermark: int
    """Every sequence up to here is journaled, or was given up by the device."""
    saved: int
    """Every sequence up to here is in a backup as well."""
    batches: int
    """Journaled."""
    samples: int
    """In them."""
    bytes: int
    """Of their payloads."""
    lost: int = 0
    """Samples receipted before the journal was set back, which neither it nor the device has any more."""
