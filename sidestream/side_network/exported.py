"""What an exported folder says of itself: which backbone its weights go beside, and how.

``sidestream trainer export --format hf`` writes it; ``sidestream.load`` and :func:`edge_agent.load_tuned`
read it. Pure.
"""

from __future__ import annotations

from typing import Final

from sidestream.contract.plan import TierPlan
from sidestream.contract.wire import Message, prepared

INDEX: Final = "sidestream.json"
WEIGHTS: Final = "sidestream.safetensors"


@prepared
class Exported(Message, frozen=True, kw_only=True):
    """One tier's side-network."""

    tier: str
    """The tier's name."""
    tier_plan: TierPlan
    """Its backbone, layers, taps, alignment map and fingerprints."""
    weights_digest: str
    """sha256 of the bundle beside it."""
