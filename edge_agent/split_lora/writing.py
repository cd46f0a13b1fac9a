"""Messages of a device in a split job, for the place in the stream that the outbox gives them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from edge_agent.batches.message import HEADER_BYTES, ROW_BYTES, Letterhead
from edge_agent.split_lora.stored_batches import StoredBatch
from edge_agent.store.streams import Slot
from sidestream.contract.messages import (
    AdapterGradient,
    AdapterUpload,
    Reuse,
    SplitPart,
    derived_key,
    ticket_of,
    to_bin,
)
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.tensors import Codec, Floats, encode, encoded_sizes
from sidestream.contract.wire import pack

Pack = Callable[[Slot], bytes]
_TARGET_BYTES: Final = 3
_PART_BYTES: Final = 256


class Writer:
    """Writes for one device under one plan.

    Args:
        plan: The job.
        tier: The device's.
    """

    def __init__(self, plan: Plan, tier: str) -> None:
        self._tier: TierPlan = plan.tiers[tier]
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

    def batch(self, batch: StoredBatch, states: Floats, part: SplitPart) -> Pack:
        """All of a batch; ``states`` are [N, d].

        Raises:
            ValueError: a state is not finite.
        """
        body = batch.body
        activations, keys = encode(states[None], self._tier.codec, self._tier.codebooks_id), self.keys(batch)

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
    def reuse(part: SplitPart, of: bytes) -> Pack:
        """That an earlier batch's activations stand for this one's."""

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
