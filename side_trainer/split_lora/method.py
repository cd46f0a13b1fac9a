"""Memory-efficient split federated LoRA (arXiv 2506.02940): every batch is answered with its gradient.

A batch in the journal changes nothing by itself. A ``serve`` record, which the trainer appends before it
acts, says which are learnt from next: so any order of service folds again to the same bits. An ``update`` is
what a device made of its gradient; it moves the adapters below the device's cut, which are the trainer's as
well, one set for all (the *held* form). Where devices keep their own (the *local* form), these come as
``upload`` at the end of a round, and a ``round`` record says which are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import msgspec
import torch

from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import FACTS, IdleRecord, RecordKind, RepeatRecord, ServeRecord
from side_trainer.method import Arrays, Facts, Reply, Step, foreign
from side_trainer.split_lora.rounds import Rounds
from side_trainer.split_lora.served_batch import part_of, told_vectors
from side_trainer.split_lora.split import SplitMethod
from side_trainer.split_lora.tickets import Source, Stage, Ticket, Tickets
from side_trainer.split_lora.turns import Turns
from side_trainer.split_lora.waiting_batches import WaitingBatches
from sidestream.contract.errors import WireError
from sidestream.contract.messages import (
    NO_BASE,
    ActivationBatch,
    AdapterGradient,
    AdapterUpload,
    GradientReply,
    Reuse,
    SplitPart,
    StateChange,
    unpack_adapter,
)
from sidestream.contract.plan import SplitLora
from sidestream.contract.tasks import PER_VECTOR
from sidestream.contract.tensors import Floats, Tensor, decode, encode
from sidestream.contract.wire import unpack
from sidestream.side_network.bundle import WeightsCodec

_SENT: Final = tuple(kind.value for kind in set(RecordKind) - FACTS - {RecordKind.IDLE})


class SplitLoraMethod(SplitMethod):
    """See the module.

    Args:
        facts: What is fixed.
        journal: Where batches are read from.
        cache_bytes: Memory for batches that are decoded and wait.
    """

    def __init__(self, facts: Facts, journal: Journal, cache_bytes: int) -> None:
        super().__init__(facts, journal, cache_bytes)
        self.tickets = Tickets()
        """What has become of every batch."""
        self.averaging = Rounds(self)
        """Of the local form."""
        self.turns = Turns()
        """Whose batch is next."""
        self._batches = WaitingBatches(journal, cache_bytes)
        self._owners: dict[str, str] = {}
        self._told_round = -1  # the last that devices were told of
        self._below = self._told_below = 0  # updates of what devices hold; those that they were told of
        self._progress = 0.0  # what is learnt of a device's answer falls with what was served last

    @property
    def plan(self) -> SplitLora:
        """The plan's part."""
        method = self.facts.settings.method
        assert isinstance(method, SplitLora)
        return method

    @property
    def is_local(self) -> bool:
        """Whether devices keep adapters of their own."""
        return self.plan.adapters == "local"

    # --- what devices send ---------------------------------------------------------------------------

    def _batch(self, record: Record) -> Step:
        batch = self._batches.arrived(record)
        self._note(record, batch)
        return self._arrived(record, Source.whole(record.offset, batch), batch.sequence, part_of(batch))

    def _note(self, record: Record, batch: ActivationBatch) -> None:
        """Count the targets of what comes for the first time."""
        assert record.stream is not None
        if part_of(batch).pass_number == 0:
            targets = batch.read_targets()
            told = targets[told_vectors(batch)] if batch.target_form in PER_VECTOR else targets
            self.count(record.stream, told, record.samples)

    def _reuse(self, record: Record) -> Step:
        message, device = unpack_adapter(record.payload), self.owner(record)
        assert isinstance(message, Reuse)
        self.tickets.heard(device, message.stream)
        earlier = self.tickets.get(device, message.of)
        source = earlier.source if earlier is not None and earlier.tier == record.tier else None
        if source is not None and isinstance(message.change, StateChange):
            source = source.changed(record.offset, message.change)
        if source is None:
            return self._refused(record, message, NO_BASE)
        return self._arrived(record, source, message.sequence, message.split)

    def _arrived(self, record: Record, source: Source, sequence: int, part: SplitPart) -> Step:
        assert record.tier is not None and record.stream is not None
        device, stream = self.owner(record), record.stream
        if self.tickets.get(device, part.ticket) is not None:  # an earlier life sent it in another way
            return self._again(record, stream, sequence, part.slot, part.ticket)
        self.tickets.heard(device, stream)
        ticket = Ticket(record.offset, source, record.tier, device, stream, sequence, part)
        self.tickets.arrived(ticket)
        self.turns.arrived(ticket)
        return Step()

    def _repeat(self, record: Record) -> Step:
        """A device that was set back sends again what is here: it has lost what it was answered."""
        found = msgspec.json.decode(record.payload, type=RepeatRecord)
        return self._again(record, found.stream, found.sequence, found.slot, found.ticket)

    def _again(self, record: Record, stream: str, sequence: int, slot: int, ticket: bytes) -> Step:
        device = self._owner_of(stream)
        self.tickets.heard(device, stream)
        known = self.tickets.get(device, ticket)
        if known is not None and known.stage is Stage.WAITING:
            known.part = msgspec.structs.replace(known.part, slot=slot)
            known.stream, known.sequence = stream, sequence
            return Step()
        return Step(replies=(self._without(record, stream, sequence, slot, ticket, "it had come before"),))

    def _refused(self, record: Record, message: Reuse, why: str) -> Step:
        place = message.stream, message.sequence, message.split.slot
        return Step(replies=(self._without(record, *place, message.ticket, why),))

    def _without(
        self, record: Record, stream: str, sequence: int, slot: int, ticket: bytes, why: str
    ) -> Reply:
        """An answer without a gradient."""
        assert record.tier is not None
        message = GradientReply(run=self.journal.run, ticket=ticket, version=record.offset, refused=why)
        return Reply(tier=record.tier, stream=stream, sequence=sequence, slot=slot, message=message)

    # --- what the trainer does -----------------------------------------------------------------------

    def next_own(self, now: float) -> tuple[RecordKind, bytes] | None:
        """Serve what waits; then end a round that is over."""
        if not self.tickets.waiting:
            ended = self.averaging.due(now)
            return None if ended is None else (RecordKind.ROUND, msgspec.json.encode(ended))
        settings = self.settings
        serve = self.turns.next(
            self.tickets.waiting,
            {name: tier.depth for name, tier in self.facts.tiers.items()},
            self.model.depth,
            policy=settings.schedule,
            most=1 if self.averaging.own_uppers else settings.serve_together,
        )
        return RecordKind.SERVE, msgspec.json.encode(serve)

    def _serve(self, record: Record) -> Step:
        serve = msgspec.json.decode(record.payload, type=ServeRecord)
        self._progress = serve.progress
        served = self.tickets.serve(serve.offsets)
        cut = self.cut_of(served[0].tier)
        assert all(self.cut_of(one.tier) == cut for one in served)
        batches = [self._batches.take(one.offset, one.source.record, one.source.changes) for one in served]
        with self.averaging.computing_for(served[0].device):
            learnt = self.learn(cut, batches, [one.stream for one in served], self.falling(serve.progress))
        replies = []
        for ticket, batch, loss, gradient in zip(
            served, batches, learnt.losses, learnt.gradients, strict=True
        ):
            self.turns.served(ticket)
            self.averaging.served(ticket)
            if ticket.stage is not Stage.DONE and self.tickets.is_current(ticket):
                keys = b"" if batch.whole else batch.keys
                replies.append(self._reply(record, ticket, gradient, loss, keys))
        by_tier: dict[str, list[float]] = {}
        for ticket, loss in zip(served, learnt.losses, strict=True):
            by_tier.setdefault(ticket.tier, []).append(loss)
        losses = {tier: sum(found) / len(found) for tier, found in by_tier.items()}
        return Step(
            updates=1,
            learnt=losses,
            replies=tuple(replies),
            served=tuple(
                (one.tier, one.stream, loss) for one, loss in zip(served, learnt.losses, strict=True)
            ),
            gradient_norm=learnt.norm,
        )

    def _reply(self, record: Record, ticket: Ticket, gradient: Floats, loss: float, keys: bytes) -> Reply:
        written: Tensor | None = None
        refused = ""
        try:
            written = encode(gradient, self.facts.tiers[ticket.tier].gradient_codec)
        except ValueError:
            refused = "its gradient is not finite"
        message = GradientReply(
            run=self.journal.run,
            ticket=ticket.part.ticket,
            version=record.offset,
            loss=loss if torch.isfinite(torch.tensor(loss)) else 0.0,
            keys=keys,
            gradient=written,
            refused=refused,
        )
        return self._to(ticket, message)

    def _update(self, record: Record) -> Step:
        """What a device made of its gradient: a step of the adapters that it holds."""
        message = unpack_adapter(record.payload)
        assert isinstance(message, AdapterGradient) and record.tier is not None
        device = self.owner(record)
        self.tickets.heard(device, message.stream)
        self.turns.returned(device, message.ticket)
        ticket = self.tickets.get(device, message.ticket)
        fresh = self.tickets.answer(device, message.ticket)
        late = self.tickets.served - ticket.served if ticket is not None and ticket.served else 0
        refused = self._why_not(record.tier, message.tensors, late) if fresh else "it had come before"
        if ticket is None:
            refused = "its batch is not here"
        elif self.is_local:
            refused = "this job averages adapters, and takes no gradients of them"
        norm: float | None = None
        if not refused:
            norm = self._step_below(message.tensors)
            self._below += 1
        replies = [self._settled(record, ticket, refused)] if ticket is not None and fresh else []
        return Step(updates=0 if refused else 1, replies=tuple(replies), gradient_norm=norm, staleness=late)

    def _why_not(self, tier: str, tensors: Mapping[str, Tensor], late: int) -> str:
        """Why a device's tensors are of no use; empty if they are of some."""
        if late > self.settings.staleness:
            return f"it is {late} batches late, and staleness is {self.settings.staleness}"
        return self.misfit(tier, tensors)

    def misfit(self, tier: str, tensors: Mapping[str, Tensor]) -> str:
        """Why tensors are not of the adapters that a tier's devices hold; empty if they are."""
        wanted = {
            name: tuple(one.shape)
            for name, one in self.model.parameters.items()
            if (layer := self.model.layer_of(name)) is not None and layer < self.cut_of(tier)
        }
        if {name: one.shape for name, one in tensors.items()} != wanted:
            return "its tensors are not those of the adapters below the cut"
        try:
            for one in tensors.values():
                decode(one)
        except WireError as exc:
            return str(exc)
        return ""

    def _step_below(self, tensors: Mapping[str, Tensor]) -> float:
        self.optimiser.forget_gradients()
        for name, one in tensors.items():
            self.model.parameters[name].grad = torch.from_numpy(decode(one))
        self.updates += 1
        return self.optimiser.step(self.falling(self._progress) * self.warmth)

    def _settled(self, record: Record, ticket: Ticket, refused: str) -> Reply:
        """Takes the gradient's place: the device's answer is in, or of no use."""
        message = GradientReply(
            run=self.journal.run, ticket=ticket.part.ticket, applied=record.offset, refused=refused
        )
        return self._to(ticket, message)

    @staticmethod
    def _to(ticket: Ticket, message: GradientReply) -> Reply:
        return Reply(
            tier=ticket.tier,
            stream=ticket.stream,
            sequence=ticket.sequence,
            slot=ticket.part.slot,
            message=message,
        )

    # --- rounds --------------------------------------------------------------------------------------

    def _upload(self, record: Record) -> Step:
        message = unpack_adapter(record.payload)
        assert isinstance(message, AdapterUpload) and record.tier is not None
        why = self.misfit(record.tier, message.tensors) if self.is_local else "this job averages nothing"
        device = self.owner(record)
        self.tickets.heard(device, message.stream)
        if not why:
            self.averaging.uploaded(record.offset, device, message)
        settled = self.tickets.open_of(device)
        for ticket in settled:
            self.tickets.answer(device, ticket.part.ticket)
        return Step(replies=tuple(self._settled(record, ticket, why) for ticket in settled))

    def _round(self, record: Record) -> Step:
        return Step(refused=self.averaging.end(record))

    handlers: ClassVar = {
        **dict.fromkeys(set(RecordKind) - FACTS, foreign),
        RecordKind.BATCH: _batch,
        RecordKind.REUSE: _reuse,
        RecordKind.REPEAT: _repeat,
        RecordKind.SERVE: _serve,
        RecordKind.UPDATE: _update,
        RecordKind.UPLOAD: _upload,
        RecordKind.ROUND: _round,
    }

    # --- what others see -----------------------------------------------------------------------------

    @property
    def rounds(self) -> int:
        return self.averaging.number

    @property
    def unverified(self) -> str:
        if not self.is_local:
            return ""
        return (
            f"devices keep their own steps between {self.rounds} averagings to themselves; what they "
            "uploaded was taken as it came, and averaged again here"
        )

    @property
    def unlearnt(self) -> int:
        return len(self.tickets.waiting)

    def owed(self, passes: float) -> int:
        """Nothing: passes are the devices'."""
        return 0

    def next_idle(self, passes: float, pass_rows: int, offset: int) -> IdleRecord:
        raise AssertionError("nothing is owed")

    def moved_by(self, before: Mapping[str, Floats], now: Mapping[str, Floats]) -> float:
        """Where devices wait for a version every one counts: with a window of 1, and at a round's end."""
        if self.is_local:
            return float("inf") if self.rounds != self._told_round else 0.0
        if self.plan.window == 1 and self._below != self._told_below:
            return float("inf")  # even if it moved nothing: a device waits for its number
        return super().moved_by(before, now)

    def bundles(
        self, run: str, version: int, codec: WeightsCodec, *, final: bool = False
    ) -> Mapping[str, bytes]:
        self._told_round, self._told_below = self.rounds, self._below
        return super().bundles(run, version, codec, final=final)

    def owner(self, record: Record) -> str:
        """The device that sent a record."""
        assert record.stream is not None
        return self._owner_of(record.stream)

    def _owner_of(self, stream: str) -> str:
        if stream not in self._owners:
            state = self.journal.stream(stream)
            assert state is not None
            self._owners[stream] = state.device
        return self._owners[stream]

    # --- checkpoints ---------------------------------------------------------------------------------

    def state(self) -> Arrays:
        return {**super().state(), **self.averaging.arrays()}

    def restore(self, offset: int, updates: int, arrays: Arrays) -> None:
        super().restore(offset, updates, arrays)
        self.averaging.restore(arrays)

    def recall(self, offset: int) -> None:
        """Which batches wait, which were served: by the records, without what they hold."""
        for record in self.journal.each(offset, _SENT):
            if record.kind == RecordKind.BATCH.value:
                batch = unpack(ActivationBatch, record.payload)
                self._note(record, batch)
                self._arrived(record, Source.whole(record.offset, batch), batch.sequence, part_of(batch))
            elif record.kind == RecordKind.REUSE.value:
                self._reuse(record)
            elif record.kind == RecordKind.REPEAT.value:
                self._repeat(record)
            elif record.kind == RecordKind.SERVE.value:
                serve = msgspec.json.decode(record.payload, type=ServeRecord)
                self._progress = serve.progress
                for ticket in self.tickets.serve(serve.offsets):
                    self.turns.recalled(ticket)
                    self.averaging.served(ticket)
            elif record.kind == RecordKind.UPDATE.value:
                message, device = unpack_adapter(record.payload), self.owner(record)
                self.tickets.heard(device, message.stream)
                self.tickets.answer(device, message.ticket)
            elif record.kind == RecordKind.UPLOAD.value:
                self._upload(record)
            else:
                self.averaging.begin_next()
