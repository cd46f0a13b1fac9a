"""What every message of activations of one device says in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from edge_agent.store.streams import Slot
from sidestream.contract.messages import ActivationBatch, SplitPart, to_bin
from sidestream.contract.plan import Plan, labels_id
from sidestream.contract.tasks import TASKS, TargetForm
from sidestream.contract.tensors import Tensor
from sidestream.contract.wire import pack

HEADER_BYTES: Final = 1024
"""What a message holds beside its arrays, at most."""
ROW_BYTES: Final = 16
"""What it holds of each row beside its vectors: number, length, target and key."""


@dataclass(frozen=True, kw_only=True)
class Letterhead:
    """The part of a message that only hangs on the plan."""

    fingerprint: str
    """Of the backbone."""
    labels_id: str
    """Of the job's labels."""
    taps: tuple[int, ...]
    """The tier's."""
    form: TargetForm
    """How targets are written."""

    @classmethod
    def of(cls, plan: Plan, tier: str) -> Letterhead:
        """For the devices of a tier."""
        return cls(
            fingerprint=plan.tiers[tier].fingerprint,
            labels_id=labels_id(plan.labels),
            taps=plan.tiers[tier].taps,
            form=TASKS[plan.task].form,
        )

    def write(
        self,
        slot: Slot,
        *,
        sampling: str,
        lengths: Sequence[int],
        targets: bytes,
        activations: Tensor,
        keys: Sequence[bytes],
        split: SplitPart | None = None,
    ) -> bytes:
        """The whole message, for its place in the stream."""
        rows = len(lengths)
        return pack(
            ActivationBatch(
                stream=slot.stream,
                sequence=slot.sequence,
                floor=slot.floor,
                fingerprint=self.fingerprint,
                labels_id=self.labels_id,
                taps=self.taps,
                sampling=sampling,
                samples=to_bin(np.arange(slot.first_sample, slot.first_sample + rows), "<u4"),
                lengths=to_bin(lengths, "<u2"),
                targets=targets,
                target_form=self.form,
                activations=activations,
                previous=slot.previous,
                keys=b"".join(keys),
                split=msgspec.UNSET if split is None else split,
            )
        )
