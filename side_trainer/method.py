"""What a training method owns on the trainer: what records do to weights, idle time, what is published.

A method lives in a room of its own; :mod:`side_trainer.method_registry` names them all. The fold hands it the
journal's records one after another and knows nothing else of it. Whatever a method draws at random derives
from the settings' seed and a record's offset: the same records give the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import IdleRecord, RecordKind, SettingsRecord, TierRecord
from sidestream.contract.errors import DecodeError, StateError
from sidestream.contract.messages import GradientReply
from sidestream.contract.tasks import Scale
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import prepared
from sidestream.side_network.bundle import WeightsCodec

if TYPE_CHECKING:
    from side_trainer.cells.group import Group
    from sidestream.accelerator.torch_device import Placement  # torch: whoever only looks on goes without

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
"""A method's state by name: float32, or what else it takes not to lose a bit."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a device is to be told of one batch, in place of whatever stands in the batch's slot."""

    tier: str
    """The device's."""
    stream: str
    """Of its outbox."""
    sequence: int
    """The batch's place there."""
    slot: int
    """Where it looks."""
    message: GradientReply
    """Versions in it are offsets of the journal; whoever publishes it adds what versions count beside."""

    @property
    def awaits(self) -> bool:
        """Whether the device is to answer it in turn."""
        return self.message.gradient is not None


@prepared
class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What applying a record did."""

    updates: int = 0
    """Optimiser updates."""
    learnt: dict[str, float] = {}
    """By tier, mean loss of all updates' rows, each before its update: arriving, replayed, or idle."""
    replies: tuple[Reply, ...] = ()
    """What devices are to be told."""
    served: tuple[tuple[str, str, float], ...] = ()
    """Of each batch that is learnt from for the first time its tier, stream, and mean loss before that."""
    gradient_norm: float | None = None
    """Of the last update, before it was clipped."""
    staleness: int | None = None
    """Of a device's answer: batches that were served since the one that it answers."""
    doubted: dict[str, float] = {}
    """Devices whose rows were found to count for less than half, with what they count, 0 to 1."""
    refused: dict[str, str] = {}
    """Devices that had something left out which was journaled, and why."""


@dataclass(kw_only=True)
class Facts:
    """What a journal has fixed so far; the fold keeps it, and a method reads it."""

    settings: SettingsRecord
    """In force."""
    labels: tuple[str, ...] = ()
    """In index order; empty until they are fixed."""
    tiers: dict[str, TierRecord] = field(default_factory=dict)
    """Those that are settled."""
    placement: Placement | None = None
    """Where it is computed, as far as the method lets it; None for the processor. The journal only tells the
    kind."""
    group: Group | None = None
    """The trainers of all cells, where there are several."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What texts of a device are answered with."""

    numbers: Floats
    """[K, C]: logits, or numbers."""
    scale: Scale
    """What a regression's numbers are measured in."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Weights as files, for people's own tools."""

    files: Mapping[str, bytes]
    """By name within the folder asked for; under an empty name what becomes the file asked for itself."""
    about: str
    """What they are, in a line."""
    usage: str = ""
    """How to load them; ``{out}`` stands for where they are."""


class Method(ABC):
    """One method's state. Built when a journal's first settings are folded.

    Args:
        facts: What is fixed; grows while records are folded.
        journal: Where what was learnt from is read again.
        cache_bytes: Memory for what was decoded.
    """

    handlers: ClassVar[Mapping[RecordKind, Callable[[Any, Record], Step]]]
    """What each kind of record but facts does. A method says of every kind what it does with it."""
    formats: ClassVar[tuple[str, ...]]
    """In which its weights can be exported."""
    lets_go: ClassVar[bool] = False
    """Whether it can do without batches that it has learnt from."""

    def __init__(self, facts: Facts, journal: Journal, cache_bytes: int) -> None:
        self.facts = facts
        self.journal = journal
        self.updates = 0
        """Optimiser updates so far."""

    # --- facts ---------------------------------------------------------------------------------------

    @abstractmethod
    def settings_changed(self) -> None:
        """The settings in force are others now; called for the first ones too."""

    @abstractmethod
    def labels_fixed(self) -> None:
        """The labels are known."""

    @abstractmethod
    def tier_settled(self, tier: TierRecord) -> None:
        """A tier is known."""

    # --- while nothing arrives -----------------------------------------------------------------------

    @abstractmethod
    def owed(self, passes: float) -> int:
        """Rows that ``passes`` over the journal still owe; nothing is owed before anything has come."""

    @abstractmethod
    def next_idle(self, passes: float, pass_rows: int, offset: int) -> IdleRecord:
        """The slice of training to journal next, at ``offset`` records folded."""

    def next_own(self, now: float) -> tuple[RecordKind, bytes] | None:
        """A record that the trainer itself owes as soon as it has folded all there is, with its payload.

        Args:
            now: In seconds. What is chosen may hang on it, for the choice is journaled.
        """
        return None

    # --- what others see -----------------------------------------------------------------------------

    @property
    def has_weights(self) -> bool:
        """Whether there is anything that devices can use."""
        return self.updates > 0

    @property
    def kept_since(self) -> int:
        """The first record of which batches are still drawn from."""
        return 1

    @property
    @abstractmethod
    def unlearnt(self) -> int:
        """Batches that are folded and wait to be learnt from."""

    def answers(self, tier: str, states: Floats, lengths: npt.NDArray[np.int64]) -> Answers:
        """Predict for a device that has no room to; nothing of the state changes by that.

        Args:
            tier: The device's.
            states: [N, d]: texts after the device's layers.
            lengths: [K]: vectors of each.

        Raises:
            StateError: it cannot.
        """
        raise StateError("the devices of this job predict by themselves")

    def moved_by(self, before: Mapping[str, Floats], now: Mapping[str, Floats]) -> float:
        """How far weights have moved, as a share of their norm.

        Args:
            before: As :meth:`weights` gave them; never empty.
            now: Likewise.
        """
        moved = sum(float(np.square(now[name] - before[name]).sum()) for name in now)
        whole = sum(float(np.square(before[name]).sum()) for name in now)
        if not moved:
            return 0.0
        return float(np.sqrt(moved / whole)) if whole else math.inf

    def gain(self, before: Mapping[str, Floats]) -> float | None:
        """By which share the loss of today's weights lies below that of earlier ones, on what came last.

        Args:
            before: As :meth:`weights` gave them; empty for untrained ones.

        Returns:
            None where that cannot be told.
        """
        return None

    @property
    def unverified(self) -> str:
        """What of the weights no journal could give again, in words; empty for nothing."""
        return ""

    @property
    @abstractmethod
    def samples(self) -> int:
        """Distinct samples learnt from."""

    @property
    def head_bytes(self) -> int:
        """Memory of frozen tensors that the method needs beside its own."""
        return 0

    @abstractmethod
    def bundles(
        self, run: str, version: int, codec: WeightsCodec, *, final: bool = False
    ) -> Mapping[str, bytes]:
        """By settled tier, what its devices get of the weights as they are now.

        Args:
            run: The journal's id.
            version: The number that devices will know them by.
            codec: How weights are written.
            final: Nothing is left to learn for now.
        """

    @abstractmethod
    def export(self, form: str, run: str, version: int, tier: str) -> Export:
        """Write the weights in one of :attr:`formats`.

        Args:
            form: Which.
            run: The journal's id.
            version: What devices know the weights by.
            tier: Whose, where the format is of one tier; empty for the method's own choice.

        Raises:
            StateError: the job's weights have no such form.
        """

    # --- checkpoints ---------------------------------------------------------------------------------

    @abstractmethod
    def weights(self) -> dict[str, Floats]:
        """Every parameter that devices get; empty before there are any."""

    @abstractmethod
    def state(self) -> Arrays:
        """All that the journal cannot give back without computing."""

    @abstractmethod
    def restore(self, offset: int, updates: int, arrays: Arrays) -> None:
        """Return to a :meth:`state` taken at ``offset``, the facts up to there having been told.

        Raises:
            DecodeError: the arrays do not fit the journal.
        """


def foreign(method: Method, record: Record) -> Step:
    """What a method does with a record of a kind that its journals never hold.

    Raises:
        DecodeError: always.
    """
    raise DecodeError(
        f"a {record.kind!r} record in a journal of {type(method.facts.settings.method).__name__}"
    )
