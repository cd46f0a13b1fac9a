"""The check that what comes on a device's adapter topic must pass. Pure."""

from __future__ import annotations

import numpy as np

from metrics.catalogue import Reason
from side_trainer.journal.adapter_arrived import misplaced
from side_trainer.receive.inbox import MAX_ACTIVATION, Examined, Refused
from sidestream.contract.errors import DecodeError
from sidestream.contract.messages import AdapterMessage, Reuse, StateChange, unpack_adapter
from sidestream.contract.plan import Plan, SplitLora, TierPlan
from sidestream.contract.tensors import Floats, Tensor, decode
from sidestream.contract.wire import MAX_MESSAGE_BYTES


def examine_adapter(payload: bytes, tier_name: str, plan: Plan) -> Examined:
    """Decode a message and hold it against the plan; whether its tensors fit, only the fold can tell.

    Raises:
        Refused: whatever the payload is, if it is nothing that the journal may keep.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise Refused(Reason.OVERSIZE, f"{len(payload)} bytes; a message holds at most {MAX_MESSAGE_BYTES}")
    try:
        message = unpack_adapter(payload)
    except DecodeError as exc:
        raise Refused(Reason.UNDECODABLE, str(exc)) from exc
    if tier_name not in plan.tiers:
        raise Refused(Reason.UNKNOWN_TIER, f"the plan has no tier {tier_name!r}")
    if not isinstance(plan.method, SplitLora) or not plan.ready_for(tier_name):
        raise Refused(Reason.MISMATCH, "the plan's method takes no such messages", message)
    if isinstance(message, Reuse):
        if why := misplaced(message.split, plan):
            raise Refused(Reason.MISMATCH, why, message)
        if isinstance(message.change, StateChange):
            _check_change(message, message.change.tensor, plan.tiers[tier_name])
        return Examined(message)
    for one in message.tensors.values():
        _values(one, message)
    return Examined(message)


def _check_change(message: Reuse, tensor: Tensor, tier: TierPlan) -> None:
    """What any change must be; whether it is one of what is here, only the fold can tell."""
    width = tensor.shape[1]
    if width != tier.width:
        raise Refused(Reason.MISMATCH, f"a change of width {width}: the plan has {tier.width}", message)
    largest = float(np.abs(_values(tensor, message)).max())
    if largest > MAX_ACTIVATION:
        raise Refused(Reason.NONFINITE, f"a change of {largest:.3g}: no activation moves so far", message)


def _values(tensor: Tensor, message: AdapterMessage) -> Floats:
    try:
        return decode(tensor)
    except DecodeError as exc:
        raise Refused(Reason.NONFINITE, str(exc), message) from exc
