"""What comes from the outbox of a device in a split job beside activations, as the journal sees it. Pure."""

from __future__ import annotations

import msgspec

from side_trainer.journal.journal import Arrived
from side_trainer.journal.records import RecordKind, RepeatRecord
from sidestream.contract.messages import (
    AdapterGradient,
    AdapterMessage,
    AdapterUpload,
    Reuse,
    SplitPart,
    content_digest,
    derived_key,
)
from sidestream.contract.plan import Plan, SplitLora

_KINDS = {
    AdapterGradient: RecordKind.UPDATE,
    AdapterUpload: RecordKind.UPLOAD,
    Reuse: RecordKind.REUSE,
}


def adapter_arrived(message: AdapterMessage, payload: bytes, tier: str, device: str) -> Arrived:
    """A message as something that counts once, in whatever stream it comes, like a sample."""
    kind = _KINDS[type(message)]
    return Arrived(
        tier=tier,
        device=device,
        stream=message.stream,
        sequence=message.sequence,
        floor=message.floor,
        content=content_digest(message),
        previous=message.previous,
        samples=1,
        keys=[derived_key(message.ticket, kind.value)],
        payload=payload,
        select=lambda rows: payload,
        kind=kind.value,
        counts=False,
        repeat=(
            repeat_of(message.stream, message.sequence, message.split) if isinstance(message, Reuse) else b""
        ),
    )


def repeat_of(stream: str, sequence: int, part: SplitPart) -> bytes:
    """What is journaled of a batch of which every row had come before: its device waits for an answer."""
    return msgspec.json.encode(
        RepeatRecord(stream=stream, sequence=sequence, ticket=part.ticket, slot=part.slot)
    )


def misplaced(part: SplitPart, plan: Plan) -> str:
    """Why a batch cannot be answered where it wants to be; empty if it can."""
    window = plan.method.window if isinstance(plan.method, SplitLora) else 1
    if part.slot >= window:
        return f"slot {part.slot} lies outside the plan's window of {window}"
    return ""
