"""The side-network as files: bundles for devices, and what people's own tools read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from side_trainer.journal.records import TierRecord
from side_trainer.method import Export
from sidestream.contract.errors import StateError
from sidestream.contract.plan import TierPlan
from sidestream.contract.tasks import TASKS
from sidestream.side_network.bundle import About, WeightsCodec, digest, encode_bundle
from sidestream.side_network.exported import INDEX, WEIGHTS, Exported
from sidestream.side_network.network import align_of, first_blocks

if TYPE_CHECKING:
    from side_trainer.side_tuning.method import SideTuningMethod


def bundle_of(
    method: SideTuningMethod,
    run: str,
    version: int,
    tiers: Sequence[TierRecord],
    *,
    blocks: int = 0,
    codec: WeightsCodec = "f32",
) -> bytes:
    """A file with the averaged weights that some tiers need.

    Args:
        method: Has the weights.
        run: The journal's id.
        version: What devices know the weights by.
        tiers: Whose alignment maps are in it.
        blocks: Only the first so many; 0 for all.
        codec: How weights are written.
    """
    settings = method.facts.settings
    aligns = {tier.align: tier.width for tier in tiers}
    about = About(
        job=settings.job,
        run=run,
        version=version,
        labels=method.facts.labels,
        task=settings.task,
        scale=method.scale,
        side_network=msgspec.structs.replace(
            settings.side_network, blocks=blocks or settings.side_network.blocks
        ),
        aligns=aligns,
        tiers={tier.tier: tier.align for tier in tiers},
    )
    tensors = {name: array for name, array in method.weights().items() if align_of(name) in (None, *aligns)}
    return encode_bundle(about, first_blocks(tensors, about.side_network.blocks), codec=codec)


def _bundle(method: SideTuningMethod, run: str, version: int, tier: str) -> Export:
    """Every alignment map, all blocks, and their spec: one safetensors file."""
    tiers = list(method.facts.tiers.values())
    names = ", ".join(one.tier for one in tiers)
    about = f"version {version}, {len(method.facts.labels)} labels, tiers {names}"
    return Export(files={"": bundle_of(method, run, version, tiers)}, about=about)


def _transformers(method: SideTuningMethod, run: str, version: int, tier: str) -> Export:
    """A folder that :func:`edge_agent.load_tuned` reads; of the deepest tier if none is named."""
    tiers = method.facts.tiers
    if not TASKS[method.facts.settings.task].generates:
        raise StateError("--format hf is for language models; leave it out")
    if tier not in tiers and (tier or not tiers):
        settled = ", ".join(sorted(tiers)) or "none"
        raise StateError(f"--tier: {tier!r} is no settled tier of the job; there are: {settled}")
    record = tiers[tier] if tier else max(tiers.values(), key=lambda one: (one.depth, one.tier))
    data = bundle_of(method, run, version, [record], blocks=len(record.taps))
    exported = Exported(tier=record.tier, tier_plan=_plan_of(record), weights_digest=digest(data))
    return Export(
        files={WEIGHTS: data, INDEX: msgspec.json.format(msgspec.json.encode(exported), indent=2)},
        about=f"tier {record.tier}, beside {record.backbone}",
        usage="load it with\n    import edge_agent\n    model, tokenizer = edge_agent.load_tuned({out!r})",
    )


def _plan_of(record: TierRecord) -> TierPlan:
    return TierPlan(
        backbone=record.backbone,
        layers=record.depth,
        align=record.align,
        sampling="all",
        depth=record.depth,
        width=record.width,
        taps=record.taps,
        fingerprint=record.fingerprint,
        head=record.head,
        vocabulary=record.vocabulary,
    )


EXPORTERS: Final[Mapping[str, Callable[[SideTuningMethod, str, int, str], Export]]] = {
    "bundle": _bundle,
    "hf": _transformers,
}
