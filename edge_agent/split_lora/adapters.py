"""Whose the adapters are that a device computes with, and what becomes of their gradients.

The *held* form: the trainer's, one set for all devices; a device returns gradients and keeps nothing. The
*local* form, the paper's: a device moves its own, uploads them at a round's end, and goes on with the mean.
These are written down at the ends of rounds only: a device that is killed within a round begins it anew, and
what it had learnt in it counts as not applied.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import msgspec

from edge_agent.batches.patience import Patience
from edge_agent.split_lora.stored_batches import Flight
from edge_agent.split_lora.writing import Pack, Writer
from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.weights.adoption import Adopter
from sidestream.contract.errors import MismatchError
from sidestream.contract.messages import ticket_of
from sidestream.contract.plan import RoundPlan
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import prepared
from sidestream.split_model.adapter_bundle import AdapterBundle
from sidestream.split_model.loading import Lower, Steps

_ROUND: Final = "split_round"
_PATIENCE_S: Final = 600.0
log = logging.getLogger(__name__)


class DeviceAdapters(ABC):
    """The device's half of the model, with the adapters in it. Belongs to one thread.

    Args:
        lower: The half.
        adopter: Adopts versions.
    """

    def __init__(self, lower: Lower, adopter: Adopter) -> None:
        self.lower = lower
        """Computes."""
        self.version = 0
        """Of the adapters in it; 0 for none."""
        self.round = 0
        """Averagings that are in them."""
        self._adopter = adopter

    @abstractmethod
    def ready(self) -> bool:
        """Take what was adopted, if it is time for that; return whether there is anything to compute with."""

    @abstractmethod
    def may_send(self, waiting: int) -> bool:
        """Whether another batch may be forwarded, while so many wait for an answer."""

    @abstractmethod
    def take(
        self, flight: Flight, gradients: Mapping[str, Floats], samples: int, progress: float
    ) -> Sequence[Pack]:
        """What a batch's answer means; return the messages that go up with that."""

    def applied(self, ticket: bytes, version: int) -> None:
        """The trainer has learnt what this device made of a batch's answer, in this version."""
        return

    def finish(self) -> bool:
        """Every batch is answered; return whether nothing else is to be done."""
        return True

    def _compute_with(self, bundle: AdapterBundle, version: int) -> None:
        below = {name: array for name, array in bundle.tensors.items() if name in self.lower.names}
        if len(below) < len(self.lower.names):
            raise MismatchError(f"version {version} lacks adapters of this device's layers")
        self.lower.load(below)
        self.version, self.round = version, bundle.about.round


class HeldAdapters(DeviceAdapters):
    """The trainer's.

    Args:
        lower: The half.
        adopter: Adopts versions.
        writer: Writes gradients.
        outbox: Says what of its messages will never arrive.
        in_step: Whether to wait, before each batch, for the adapters that the last answer is in.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        lower: Lower,
        adopter: Adopter,
        writer: Writer,
        outbox: Outbox,
        *,
        in_step: bool,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(lower, adopter)
        self._writer = writer
        self._outbox = outbox
        self._in_step = in_step
        self._clock = clock
        self._needed = 0
        self._awaited = b""  # the batch whose answer is not known to be learnt from
        self._since_s = 0.0  # that it is awaited
        self._given_up = 0  # messages until then

    def ready(self) -> bool:
        in_use = self._adopter.in_use
        if in_use is not None and in_use.version > self.version:
            self._compute_with(in_use.network, in_use.version)
        return self.version > 0

    def may_send(self, waiting: int) -> bool:
        if self._awaited and self._is_vain():
            log.warning("what this device made of a batch may never be learnt: it goes on without")
            self._awaited = b""
        return not self._in_step or (not self._awaited and self.version >= self._needed)

    def applied(self, ticket: bytes, version: int) -> None:
        if ticket == self._awaited:
            self._awaited = b""
        self._needed = max(self._needed, version)

    def take(
        self, flight: Flight, gradients: Mapping[str, Floats], samples: int, progress: float
    ) -> Sequence[Pack]:
        self._awaited, self._since_s, self._given_up = flight.ticket, self._clock(), self._lost_messages()
        return [self._writer.gradient(flight.ticket, flight.adapter, samples, gradients)]

    def _is_vain(self) -> bool:
        """Whether to wait no longer: what was sent may be lost, or the word of it, which is not kept."""
        return self._lost_messages() > self._given_up or self._clock() - self._since_s > _PATIENCE_S

    def _lost_messages(self) -> int:
        counters = self._outbox.counters()
        return int(counters["batches_refused"] + counters["batches_dropped"])


@prepared
class _Round(msgspec.Struct, frozen=True, kw_only=True):
    """What of a round outlives the process."""

    number: int = -1
    """The round that the device was in."""
    steps: int = 0
    """That it had made in it."""
    uploaded: int = -1
    """The last round that it uploaded."""


class OwnAdapters(DeviceAdapters):
    """The device's own.

    Args:
        lower: The half.
        adopter: Adopts means.
        writer: Writes uploads.
        steps: The device's optimiser.
        plan: When rounds end.
        outbox: Takes uploads.
        patience: Writes to it.
        on_batch: Called after an upload.
    """

    def __init__(
        self,
        lower: Lower,
        adopter: Adopter,
        writer: Writer,
        steps: Steps,
        plan: RoundPlan,
        outbox: Outbox,
        *,
        patience: Patience,
        on_batch: Callable[[], None],
    ) -> None:
        super().__init__(lower, adopter)
        self._writer = writer
        self._steps = steps
        self._plan = plan
        self._outbox = outbox
        self._patience = patience
        self._on_batch = on_batch
        self._samples = 0
        kept = outbox.value(_ROUND)
        self._kept = msgspec.json.decode(kept, type=_Round) if kept else _Round()

    def ready(self) -> bool:
        in_use = self._adopter.in_use
        if in_use is None:
            return self.version > 0
        told = in_use.network.about.round
        set_back = told < self.round and in_use.version > self.version
        if not self.version or told > self.round or set_back:
            self._begin(in_use.network, in_use.version, set_back=set_back)
        return True

    def may_send(self, waiting: int) -> bool:
        if self._kept.uploaded >= self.round:  # the mean has yet to come
            return False
        if self._kept.steps + waiting < self._plan.batches:
            return True
        if not waiting:
            self._upload()
        return False

    def take(
        self, flight: Flight, gradients: Mapping[str, Floats], samples: int, progress: float
    ) -> Sequence[Pack]:
        if self._kept.uploaded < self.round:
            final = self._plan.final_rate
            self._steps.step(gradients, final + (1 - final) * (1 - progress))
            self._samples += samples
            self._keep(steps=self._kept.steps + 1)
        return ()

    def finish(self) -> bool:
        if self._kept.steps and self._kept.uploaded < self.round:
            self._upload()
        return True

    def _begin(self, bundle: AdapterBundle, version: int, *, set_back: bool = False) -> None:
        """Begin the round that a version is of; an earlier one, if the trainer's journal was set back."""
        before = self._kept
        if before.steps and before.uploaded < before.number:
            self._outbox.count("gradients_lost", before.steps)
            log.warning(
                "this device's %d steps of round %d came into no average: it was started anew, or was late",
                *(before.steps, before.number),
            )
        self._compute_with(bundle, version)
        self._steps.begin()
        self._samples = 0
        uploaded = min(before.uploaded, self.round - 1) if set_back else before.uploaded
        self._keep(number=self.round, steps=0, uploaded=uploaded)

    def _upload(self) -> None:
        name = ticket_of([self._outbox.name(b"round")], self.round)
        samples, steps = max(1, self._samples), self._kept.steps
        packed = self._writer.upload(name, self.round, samples, steps, self.lower.arrays())
        kept = msgspec.structs.replace(self._kept, uploaded=self.round)
        note = partial(self._note, kept)
        if self._patience.write(partial(self._outbox.append_all, [(packed, 0)], Consumed(), note)):
            self._kept = kept
            self._on_batch()

    def _keep(self, **changes: int) -> None:
        kept = msgspec.structs.replace(self._kept, **changes)
        if self._patience.write(partial(self._outbox.append_all, [], Consumed(), partial(self._note, kept))):
            self._kept = kept

    def _note(self, kept: _Round, db: object) -> None:
        self._outbox.set_value(_ROUND, msgspec.json.encode(kept).decode())
