"""The check that a device's query must pass. Pure."""

from __future__ import annotations

from sidestream.contract.messages import Query
from sidestream.contract.plan import Plan, Split


def why_not(query: Query, tier_name: str, plan: Plan) -> str:
    """Why a query cannot be answered, in words for whoever asked; empty if it can.

    One is no larger than a batch of its tier may be: so one answer takes no longer than an update.
    """
    tier = plan.tiers.get(tier_name)
    if tier is None:
        return f"the job has no tier {tier_name!r}"
    if not isinstance(plan.method, Split):
        return "the devices of this job predict by themselves"
    if not plan.ready_for(tier_name):
        return "the job's labels, or the device's tier, are not settled yet"
    if query.run != plan.run:
        return "the device's weights are of another journal than the trainer's; let its agent adopt new ones"
    if query.fingerprint != tier.fingerprint:
        return "the device's layers are not those of its tier"
    vectors, width = query.states.shape
    if width != tier.width:
        return f"states of width {width}: the tier's have {tier.width}"
    if query.states.codec.stages and query.states.codebooks != tier.codebooks_id:
        return "states written with other codebooks than the plan's"
    if len(query.text_lengths) > tier.batch_size or vectors > tier.batch_size * tier.max_tokens:
        return f"more than a batch of the tier's in one query: {tier.batch_size} texts at most"
    if int(query.text_lengths.max()) > tier.max_tokens:
        return f"a text of {int(query.text_lengths.max())} vectors: the tier's have {tier.max_tokens} at most"
    return ""
