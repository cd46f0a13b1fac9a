"""What a training method owns on the trainer: what records do to weights, idle time, what is published.

A method lives in a room of its own; :mod:`side_trainer.method_registry` names them all. The fold hands it the
journal's records one after another and knows nothing else of it. Whatever a method draws at random derives
from the settings' seed and a record's offset: the same records give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import IdleRecord, RecordKind, SettingsRecord, TierRecord
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import prepared
from sidestream.side_network.bundle import WeightsCodec


@prepared
class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What applying a record did."""

    updates: int = 0
    """Optimiser updates."""
    losses: dict[str, float] = {}
    """By tier, mean loss of an arriving batch's rows, before anything was learnt from it."""
    learnt: dict[str, float] = {}
    """By tier, mean loss of all updates' rows, each before its update: arriving, replayed, or idle."""
    doubted: dict[str, float] = {}
    """Devices whose rows were found to count for less than half, with what they count, 0 to 1."""


@dataclass(kw_only=True)
class Facts:
    """What a journal has fixed so far; the fold keeps it, and a method reads it."""

    settings: SettingsRecord
    """In force."""
    labels: tuple[str, ...] = ()
    """In index order; empty until they are fixed."""
    tiers: dict[str, TierRecord] = field(default_factory=dict)
    """Those that are settled."""


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

    # --- what others see -----------------------------------------------------------------------------

    @property
    @abstractmethod
    def samples(self) -> int:
        """Distinct samples learnt from."""

    @property
    def head_bytes(self) -> int:
        """Memory of frozen tensors that the method needs beside its own."""
        return 0

    @abstractmethod
    def bundles(self, run: str, version: int, codec: WeightsCodec) -> Mapping[str, bytes]:
        """By settled tier, what its devices get of the weights as they are now.

        Args:
            run: The journal's id.
            version: The number that devices will know them by.
            codec: How weights are written.
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
    def state(self) -> dict[str, Floats]:
        """All that the journal cannot give back without computing."""

    @abstractmethod
    def restore(self, offset: int, updates: int, arrays: Mapping[str, Floats]) -> None:
        """Return to a :meth:`state` taken at ``offset``, the facts up to there having been told.

        Raises:
            DecodeError: the arrays do not fit the journal.
        """
