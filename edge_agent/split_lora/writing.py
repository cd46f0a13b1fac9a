"""Messages of a device in a split job, for the place in the stream that the outbox gives them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np

from edge_agent.batches.message import HEADER_BYTES, ROW_BYTES, Letterhead
from edge_agent.split_lora.held_states import added_up, written_change
from edge_agent.split_lora.stored_batches import StoredBatch
from edge_agent.store.streams import Slot
from sidestream.contract.messages import (
    MAX_CHANGES,
    AdapterGradient,
    AdapterUpload,
    Reuse,
    SplitPart,
    StateChange,
    derived_key,
    ticket_of,
    to_bin,
)
from sidestream.contract.plan import Plan, SplitLora, TierPlan
from sidestream.contract.tensors import Codec, Floats, Tensor, encode, encoded_sizes
from sidestream.contract.wire import pack

Pack = Callable[[Slot], bytes]
_TARGET_BYTES: Final = 3
_PART_BYTES: Final = 256
_CHANGE_CODECS: Final = {0: None, 2: Codec.INT2, 4: Codec.INT4, 8: Codec.INT8}
_CHANGE_BELOW: Final = 0.5
"""Of the norm of the states that were sent whole: what moved by more is sent whole again."""


class Writer:
    """Writes for one device under one plan.

    Args:
        plan: The job.
        tier: The device's.
    """

    def __init__(self, plan: Plan, tier: str) -> None:
        self._tier: TierPlan = plan.tiers[tier]
        bits = plan.method.change_bits if isinstance(plan.method, SplitLora) else 0
        self._change_codec = _CHANGE_CODECS[bits]
        self._letterhead = Letterhead.of(plan, tier)

    def size(self, rows: int, tokens: int) -> int:
        """What a batch takes, at most."""
        data, scales = encoded_sizes(self._tier.codec, (1, tokens, self._tier.width))
        fixed = HEADER_BYTES + _PART_BYTES + (ROW_BYTES + 2) * rows
        return fixed + data + scales + _TARGET_BYTES * tokens

    def keys(self, batch: StoredBatch) -> list[bytes]:
        """By what the trainer knows a batch's rows in this pass: in each they count once."""
        if not batch.passes:
            return list(batch.body.names)
        return [derived_key(name, f"pass {batch.passes}") for name in batch.body.names]

    def ticket(self, batch: StoredBatch) -> bytes:
        """The name of a batch in this pass."""
        return ticket_of(batch.body.names, batch.passes)

    def states(self, states: Floats) -> Tensor:
        """States [N, d] as a whole batch has them.

        Raises:
            ValueError: one is not finite.
        """
        return encode(states[None], self._tier.codec, self._tier.codebooks_id)

    @property
    def sends_changes(self) -> bool:
        """Whether batches may be sent as their change."""
        return self._change_codec is not None

    def change(self, states: Floats, held: Sequence[Tensor]) -> Tensor | None:
        """What states [N, d] are beyond those that the trainer has; None if the whole is to be sent."""
        if self._change_codec is None or not held or len(held) > MAX_CHANGES:
            return None
        if sum(encoded_sizes(self._change_codec, states.shape)) > held[0].nbytes:
            return None
        change = states - added_up(held)
        if not np.linalg.norm(change) < _CHANGE_BELOW * np.linalg.norm(added_up(held[:1])):
            return None
        return written_change(change, self._change_codec)

    def batch(self, batch: StoredBatch, activations: Tensor, part: SplitPart) -> Pack:
        """All of a batch."""
        body, keys = batch.body, self.keys(batch)

        def packed(slot: Slot) -> bytes:
            return self._letterhead.write(
                slot,
                sampling="all",
                lengths=[len(ids) for ids in body.ids],
                targets=body.targets,
                activations=activations,
                keys=keys,
                split=part,
            )

        return packed

    @staticmethod
    def reuse(part: SplitPart, of: bytes, change: StateChange | msgspec.UnsetType = msgspec.UNSET) -> Pack:
        """That an earlier batch's activations stand for this one's, as they are or with a change."""

        def packed(slot: Slot) -> bytes:
            return pack(
                Reuse(
                    stream=slot.stream,
                    sequence=slot.sequence,
                    floor=slot.floor,
                    previous=slot.previous,
                    ticket=part.ticket,
                    of=of,
                    split=part,
                    change=change,
                )
            )

        return packed

    def gradient(self, ticket: bytes, adapter: int, samples: int, tensors: Mapping[str, Floats]) -> Pack:
        """What an answer means for the adapters."""
        written = {name: encode(array, self._tier.gradient_codec) for name, array in tensors.items()}

        def packed(slot: Slot) -> bytes:
            return pack(
                AdapterGradient(
                    stream=slot.stream,
                    sequence=slot.sequence,
                    floor=slot.floor,
                    previous=slot.previous,
                    ticket=ticket,
                    adapter=adapter,
                    samples=samples,
                    tensors=written,
                )
            )

        return packed

    def upload(
        self, name: bytes, number: int, samples: int, steps: int, tensors: Mapping[str, Floats]
    ) -> Pack:
        """The device's own adapters, at a round's end."""
        codec = Codec.F32 if self._tier.gradient_codec is Codec.F32 else Codec.F16
        written = {one: encode(array, codec) for one, array in tensors.items()}

        def packed(slot: Slot) -> bytes:
            return pack(
                AdapterUpload(
                    stream=slot.stream,
                    sequence=slot.sequence,
                    floor=slot.floor,
                    previous=slot.previous,
                    ticket=name,
                    round=number,
                    samples=samples,
                    steps=steps,
                    tensors=written,
                )
            )

        return packed

    @staticmethod
    def context(batch: StoredBatch) -> bytes:
        """u16[K] of the rows' tokens without a target."""
        counts = batch.body.context
        return to_bin(np.array(counts), "<u2") if any(counts) else b""
