"""The side-network as files: bundles for devices, and what people's own tools read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from side_trainer.journal.records import TierRecord
from side_trainer.method import Export, Facts
from sidestream.contract.errors import StateError
from sidestream.contract.plan import TierPlan
from sidestream.contract.tasks import TASKS, Scale
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import About, WeightsCodec, digest, encode_bundle
from sidestream.side_network.exported import INDEX, WEIGHTS, Exported
from sidestream.side_network.form import align_of, first_blocks, starts_among
from sidestream.side_network.narrowing import Narrow


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """A side-network as it is at one moment."""

    facts: Facts
    """What the job is."""
    weights: Mapping[str, Floats]
    """Every parameter, averaged."""
    scale: Scale
    """What answers are measured in."""
    run: str
    """The journal's id."""
    version: int
    """What devices know the weights by."""


def bundle_of(
    learnt: Learnt,
    tiers: Sequence[TierRecord],
    *,
    blocks: int = 0,
    codec: WeightsCodec = "f32",
    narrow: Narrow | None = None,
) -> bytes:
    """A file with the weights that some tiers need.

    Args:
        learnt: All weights.
        tiers: Whose alignment maps are in it.
        blocks: Only the first so many; 0 for all.
        codec: How weights are written.
        narrow: In how few directions, if not as they are.
    """
    settings = learnt.facts.settings
    aligns = {tier.align: tier.width for tier in tiers}
    count = blocks or settings.side_network.blocks
    tensors = {name: array for name, array in learnt.weights.items() if align_of(name) in (None, *aligns)}
    tensors = first_blocks(tensors, blocks) if blocks else tensors
    about = About(
        job=settings.job,
        run=learnt.run,
        version=learnt.version,
        labels=learnt.facts.labels,
        seed=settings.learner.seed,
        task=settings.task,
        scale=learnt.scale,
        side_network=msgspec.structs.replace(settings.side_network, blocks=count),
        aligns=aligns,
        tiers={tier.tier: tier.align for tier in tiers},
        starts=starts_among(tensors),
    )
    return encode_bundle(about, tensors if narrow is None else narrow.of(tensors), codec=codec)


def bundles_of(learnt: Learnt, codec: WeightsCodec, narrow: Narrow | None) -> dict[str, bytes]:
    """By tier what it needs and no more: its own alignment map, and the blocks up to its last tap."""
    tiers, made = learnt.facts.tiers, dict[tuple[str, int], bytes]()
    for align, blocks in {_needs(tier) for tier in tiers.values()}:
        members = [tier for tier in tiers.values() if _needs(tier) == (align, blocks)]
        made[align, blocks] = bundle_of(learnt, members, blocks=blocks, codec=codec, narrow=narrow)
    return {name: made[_needs(tier)] for name, tier in tiers.items()}


def _needs(tier: TierRecord) -> tuple[str, int]:
    """Tiers with the same alignment map and number of taps need the same bundle."""
    return tier.align, len(tier.taps)


def _bundle(learnt: Learnt, tier: str) -> Export:
    """Every alignment map, all blocks, and their spec: one safetensors file."""
    tiers = list(learnt.facts.tiers.values())
    names = ", ".join(one.tier for one in tiers)
    about = f"version {learnt.version}, {len(learnt.facts.labels)} labels, tiers {names}"
    return Export(files={"": bundle_of(learnt, tiers)}, about=about)


def _transformers(learnt: Learnt, tier: str) -> Export:
    """A folder that ``sidestream.load`` reads; of the deepest tier if none is named."""
    tiers = learnt.facts.tiers
    if tier not in tiers and (tier or not tiers):
        settled = ", ".join(sorted(tiers)) or "none"
        raise StateError(f"--tier: {tier!r} is no settled tier of the job; there are: {settled}")
    record = tiers[tier] if tier else max(tiers.values(), key=lambda one: (one.depth, one.tier))
    data = bundle_of(learnt, [record], blocks=len(record.taps))
    plan = TierPlan(backbone=record.backbone, layers=record.depth, sampling="all", **record.facts())
    exported = Exported(tier=record.tier, tier_plan=plan, weights_digest=digest(data))
    return Export(
        files={WEIGHTS: data, INDEX: msgspec.json.format(msgspec.json.encode(exported), indent=2)},
        about=f"tier {record.tier}, beside {record.backbone}",
        usage=_USAGE["tuned" if TASKS[learnt.facts.settings.task].generates else "any"],
    )


_USAGE: Final = {
    "any": "load it with\n    import sidestream\n    model = sidestream.load({out!r})",
    "tuned": "load it with\n    import edge_agent\n    model, tokenizer = edge_agent.load_tuned({out!r})",
}
EXPORTERS: Final[Mapping[str, Callable[[Learnt, str], Export]]] = {
    "bundle": _bundle,
    "hf": _transformers,
}
