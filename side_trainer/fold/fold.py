"""The fold: weights as a pure function of the journal.

Facts it keeps; what every other record does is the method's to say (:mod:`side_trainer.method`). The same
records give the same bits, in this process or another, from the start or from a checkpoint. It knows nothing
of brokers, clocks or publishing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from side_trainer.codebook_store import CodebookStore
from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import FACTS, LabelsRecord, RecordKind, SettingsRecord, TierRecord
from side_trainer.method import Arrays, Facts, Method, Step
from side_trainer.method_registry import IN_CELLS, METHODS
from sidestream.contract.errors import StateError, WireError
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import state_digest

if TYPE_CHECKING:
    from side_trainer.cells.group import Group
    from sidestream.accelerator.torch_device import Placement


class Fold:
    """The learner's state, and how records change it.

    Args:
        journal: Where replayed rows are read from.
        cache_bytes: Memory for decoded rows.
        placement: Where it is computed; None for the processor. Bits are the same on one kind of device only.
        group: The trainers of all cells, where the journal is one cell's.

    Raises:
        StateError: codebooks beside the journal are damaged.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        cache_bytes: int = 256 * 2**20,
        placement: Placement | None = None,
        group: Group | None = None,
    ) -> None:
        CodebookStore(journal.folder).load()
        self.offset = 0
        """The last record applied."""
        self._method: Method | None = None
        self._journal = journal
        self._cache_bytes = cache_bytes
        self._placement = placement
        self._group = group

    @property
    def begun(self) -> bool:
        """Whether the journal's first settings have been folded."""
        return self._method is not None

    @property
    def method(self) -> Method:
        """How the job learns, and what it has learnt. Only once it has :attr:`begun`."""
        assert self._method is not None
        return self._method

    @property
    def facts(self) -> Facts:
        """What is fixed. Only once it has :attr:`begun`."""
        return self.method.facts

    @property
    def updates(self) -> int:
        """Optimiser updates so far."""
        return self._method.updates if self._method is not None else 0

    @property
    def samples(self) -> int:
        """Distinct samples learnt from."""
        return self._method.samples if self._method is not None else 0

    @property
    def has_weights(self) -> bool:
        """Whether there is anything that devices can use."""
        return self._method is not None and self._method.has_weights

    def apply(self, record: Record) -> Step:
        """Apply the record that follows the last one.

        Raises:
            StateError: if the record is not what the trainer wrote: the journal is damaged.
        """
        if record.offset != self.offset + 1:
            raise StateError(f"the journal is damaged: record {self.offset + 1} is missing")
        try:
            step = self._apply(record)
        except (msgspec.MsgspecError, WireError, AssertionError, KeyError, IndexError) as exc:
            raise StateError(f"the journal is damaged: record {record.offset} cannot be folded") from exc
        self.offset = record.offset
        return step

    def _apply(self, record: Record) -> Step:
        try:
            kind = RecordKind(record.kind)
        except ValueError as exc:
            raise StateError(
                f"the journal holds a {record.kind!r} record, which this version cannot fold"
            ) from exc
        if kind not in FACTS:
            return self.method.handlers[kind](self.method, record)
        self._apply_fact(kind, record.payload)
        return Step()

    def _apply_fact(self, kind: RecordKind, payload: bytes) -> None:
        if kind is RecordKind.SETTINGS:
            settings = msgspec.json.decode(payload, type=SettingsRecord)
            if self._method is None:
                facts = Facts(settings=settings, placement=self._placement, group=self._group)
                methods = METHODS if self._group is None else IN_CELLS
                self._method = methods[type(settings.method)](facts, self._journal, self._cache_bytes)
            self.facts.settings = settings
            self.method.settings_changed()
        elif kind is RecordKind.LABELS:
            self.facts.labels = msgspec.json.decode(payload, type=LabelsRecord).labels
            self.method.labels_fixed()
        else:
            tier = msgspec.json.decode(payload, type=TierRecord)
            self.facts.tiers[tier.tier] = tier
            self.method.tier_settled(tier)

    # --- state ---------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Floats]:
        """The parameters that devices get; empty before there are any."""
        return self._method.weights() if self._method is not None else {}

    def digest(self) -> str:
        """sha256 of :meth:`weights`."""
        return state_digest(self.weights())

    def state(self) -> Arrays:
        """All that the journal up to :attr:`offset` cannot give back without computing: for a checkpoint."""
        return self._method.state() if self._method is not None else {}

    def restore(self, offset: int, updates: int, arrays: Arrays) -> None:
        """Return to a :meth:`state` taken at ``offset``; everything else is read from the journal.

        Raises:
            DecodeError: if the arrays do not fit the journal.
        """
        self.recall_facts(offset)
        if self._method is not None:
            self._method.restore(offset, updates, arrays)
        self.offset = offset

    def recall_facts(self, offset: int) -> None:
        """Read settings, labels and tiers up to ``offset``, without what was learnt."""
        for record in self._journal.others(offset, tuple(kind.value for kind in FACTS)):
            self._apply_fact(RecordKind(record.kind), record.payload)
