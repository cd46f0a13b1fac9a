"""A side-network as it comes down, held against the plan."""

from __future__ import annotations

from weakref import WeakValueDictionary

import msgspec

from edge_agent.weights.adoption import Opened
from sidestream.contract.errors import MismatchError
from sidestream.contract.plan import Plan
from sidestream.side_network.bundle import decode_bundle, digest
from sidestream.side_network.inference import InferenceNetwork

_shared: WeakValueDictionary[str, InferenceNetwork] = WeakValueDictionary()


def read_side_network(data: bytes, *, plan: Plan, tier: str) -> Opened:
    """The side-network in a bundle, if it is the one that the plan describes.

    Raises:
        DecodeError: it is none.
        MismatchError: it is another one.
    """
    network = _network(data)
    about, wanted = network.about, plan.tiers[tier]
    blocks = about.side_network.blocks
    if (
        about.job != plan.job
        or (about.task, about.labels) != (plan.task, plan.labels)
        or about.side_network != msgspec.structs.replace(plan.side_network, blocks=blocks)
    ):
        raise MismatchError("the bundle's job, task, labels or side-network are not the plan's")
    if not len(wanted.taps) <= blocks <= plan.side_network.blocks:
        raise MismatchError(
            f"the bundle's {blocks} blocks are not enough for the tier's {len(wanted.taps)} taps"
        )
    if about.tiers.get(tier) != wanted.align or about.aligns.get(wanted.align) != wanted.width:
        raise MismatchError(f"the bundle does not serve tier {tier!r} of width {wanted.width}")
    return Opened(about.run, about.version, network)


def _network(data: bytes) -> InferenceNetwork:
    """A bundle's, which all agents of this process share."""
    name = digest(data)
    network = _shared.get(name)
    if network is None:
        network = _shared[name] = InferenceNetwork(decode_bundle(data))
    return network
