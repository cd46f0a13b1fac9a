"""Rounds of devices' own adapters (the local form): who takes part, when one is over, what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import RoundRecord
from side_trainer.settings.schema import LearnerSettings
from side_trainer.split_lora.local import OwnUppers, Upload, averaged, too_far
from side_trainer.split_lora.optimiser import Optimiser
from side_trainer.split_lora.tickets import Ticket
from sidestream.contract.messages import AdapterUpload, unpack_adapter
from sidestream.contract.plan import SplitLora
from sidestream.contract.tensors import Floats, decode

if TYPE_CHECKING:
    from sidestream.split_model.split_model import SplitModel

_NEVER: Final = float("inf")


class Averages(Protocol):
    """What rounds need of their method."""

    journal: Journal

    @property
    def plan(self) -> SplitLora:
        """The plan's part."""

    @property
    def is_local(self) -> bool:
        """Whether devices keep adapters of their own."""

    @property
    def settings(self) -> LearnerSettings:
        """In force."""

    @property
    def is_known(self) -> bool:
        """Whether there is a model."""

    @property
    def model(self) -> SplitModel:
        """The model."""

    @property
    def optimiser(self) -> Optimiser:
        """Of all that is trained."""

    def owner(self, record: Record) -> str:
        """The device that sent a record."""


class Rounds:
    """Belongs to its method.

    Args:
        method: Has the model.
    """

    def __init__(self, method: Averages) -> None:
        self.number = 0
        """Of the round that is on: how many have been averaged."""
        self._method = method
        self._uppers: OwnUppers | None = None
        # Of this round and later ones: a journal that was set back gets several at once.
        self._served: dict[int, dict[str, int]] = {}  # by device, rows served
        self._arrived: dict[int, dict[str, tuple[int, int]]] = {}  # by device, record and samples
        self._since_s = _NEVER
        self._batches = 0  # that were served in this round

    @property
    def own_uppers(self) -> bool:
        """Whether each device has a set of its own above its cut."""
        return self._method.is_local and self._method.plan.upper == "per-device"

    @contextmanager
    def computing_for(self, device: str) -> Iterator[None]:
        """Have the model compute with what is the device's above its cut."""
        if not self.own_uppers:
            yield
            return
        uppers = self._sets()
        common = uppers.swap_in(device)
        try:
            yield
        finally:
            uppers.swap_out(device, common)

    def served(self, ticket: Ticket) -> None:
        """A batch was learnt from."""
        self._batches += 1
        if ticket.part.round >= self.number:
            rows = self._served.setdefault(ticket.part.round, {})
            rows[ticket.device] = rows.get(ticket.device, 0) + ticket.part.rows

    def uploaded(self, offset: int, device: str, message: AdapterUpload) -> None:
        """A device's adapters have come; those of a round that is over are of no use any more."""
        if message.round >= self.number:
            self._arrived.setdefault(message.round, {})[device] = offset, message.samples

    def due(self, now: float) -> RoundRecord | None:
        """The end of the round, if it is over."""
        plan = self._method.plan.round
        if not self._uploads or len(self._uploads) < plan.devices:
            self._since_s = _NEVER
            return None
        self._since_s = min(self._since_s, now)
        if not self._rows.keys() <= self._uploads.keys():
            if now - self._since_s < plan.deadline_s:
                return None
            samples = sum(self._weight(device, said) for device, (_, said) in self._uploads.items())
            if samples < plan.quorum * sum(self._rows.values()):
                return None
        offsets = sorted(offset for offset, _ in self._uploads.values())
        return RoundRecord(number=self.number, uploads=tuple(offsets))

    def end(self, record: Record) -> dict[str, str]:
        """Average, and begin the next; return whose adapters were left out of it, and why."""
        ended = msgspec.json.decode(record.payload, type=RoundRecord)
        method = self._method
        uploads, refused = [self._read(offset) for offset in ended.uploads], dict[str, str]()
        if uploads:  # a rebuild may have taken all of them out
            common = method.model.arrays()
            travel = 0.0 if self.own_uppers else method.settings.learning_rate * self._batches
            refused = too_far(uploads, common, method.plan.round, travel)
            uploads = [one for one in uploads if one.device not in refused]
        if uploads:
            method.model.load(averaged(uploads, common, self._uppers if self.own_uppers else None))
        self.begin_next()
        return refused

    def begin_next(self) -> None:
        """What was of a round that has been averaged is over."""
        for of_round in (self._served, self._arrived):
            of_round.pop(self.number, None)
        self.number += 1
        self._since_s = _NEVER
        self._batches = 0
        if self._uppers is not None:
            self._uppers.clear()

    def arrays(self) -> dict[str, Floats]:
        """For a checkpoint."""
        return self._uppers.arrays() if self._uppers is not None else {}

    def restore(self, arrays: Mapping[str, Floats]) -> None:
        """Return to what :meth:`arrays` gave; the rest is in the records."""
        if self.own_uppers and self._method.is_known:
            self._sets().restore(arrays)

    @property
    def _rows(self) -> dict[str, int]:
        return self._served.get(self.number, {})

    @property
    def _uploads(self) -> dict[str, tuple[int, int]]:
        return self._arrived.get(self.number, {})

    def _sets(self) -> OwnUppers:
        if self._uppers is None:
            self._uppers = OwnUppers(self._method.model.parameters, self._method.optimiser)
        return self._uppers

    def _weight(self, device: str, said: int) -> int:
        """Samples that a device's steps were on: no more than it was answered for, whatever it says."""
        return max(1, min(said, self._rows.get(device, 0)))

    def _read(self, offset: int) -> Upload:
        record = self._method.journal.get(offset)
        message = unpack_adapter(record.payload)
        assert isinstance(message, AdapterUpload)
        device = self._method.owner(record)
        return Upload(
            offset=offset,
            device=device,
            samples=self._weight(device, message.samples),
            tensors={name: decode(one) for name, one in message.tensors.items()},
        )
