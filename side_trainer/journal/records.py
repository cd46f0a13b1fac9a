"""What the journal holds beside batches, as JSON: facts of a job, and slices of training."""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

from side_trainer.settings.schema import LearnerSettings
from sidestream.contract.plan import FedMobiLLM, MethodPlan, SideNetworkSpec, TierFacts
from sidestream.contract.tasks import Task
from sidestream.contract.wire import Message, prepared


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
    IDLE = "idle"
    """:class:`IdleRecord`"""


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
class IdleRecord(Message, frozen=True, kw_only=True):
    """A slice of training over the journal while nothing arrives."""

    phase: int
    """The offset that the phase started at: its rows are those of the batches up to there."""
    position: Annotated[int, msgspec.Meta(ge=0)]
    """The slice's first row, counted over the phase's shuffled passes."""
    rows: Annotated[int, msgspec.Meta(ge=1)]
    """Rows in the slice."""
    total: Annotated[int, msgspec.Meta(ge=1)]
    """Rows that the whole phase is meant to train on: the learning rate falls over them."""
