"""Adapters as they come down, held against the plan."""

from __future__ import annotations

from edge_agent.weights.adopted import AdoptedWeights
from edge_agent.weights.adoption import Opened
from sidestream.contract.errors import MismatchError, StateError, WireError
from sidestream.contract.plan import Plan, Split
from sidestream.split_model.adapter_bundle import AdapterBundle, decode_adapters


def bundle_of(kept: AdoptedWeights) -> AdapterBundle:
    """What a device of a split job adopted.

    Raises:
        StateError: it is damaged.
    """
    try:
        return decode_adapters(kept.data)
    except WireError as exc:
        raise StateError(f"the adopted weights cannot be used: {exc}") from exc


def read_adapters(data: bytes, *, plan: Plan, tier: str) -> Opened:
    """The adapters in a bundle, if they are those that the plan describes.

    Raises:
        DecodeError: they are none.
        MismatchError: they are others.
    """
    bundle = decode_adapters(data)
    about, method = bundle.about, plan.method
    assert isinstance(method, Split)
    if (about.job, about.task, about.labels) != (plan.job, plan.task, plan.labels):
        raise MismatchError("the adapters' job, task or labels are not the plan's")
    if about.lora != method.lora or (about.tier, about.cut) != (tier, plan.tiers[tier].depth):
        raise MismatchError("the adapters are of another form or cut than the plan's")
    return Opened(about.run, about.version, bundle)
