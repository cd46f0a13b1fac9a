"""The whole model on a device, for those that have room for it."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from sidestream.backbone.memory import free_memory_bytes
from sidestream.backbone.runtimes import shared_backbone
from sidestream.contract.plan import TierPlan
from sidestream.contract.tasks import TASKS, Task
from sidestream.split_model.adapter_bundle import AdapterBundle
from sidestream.split_model.loading import Whole, whole_model

WholeModel: TypeAlias = Literal["auto", "always", "never"]
"""Whether all layers may be loaded; auto: where there is room."""
_NEEDED: Final = 2.0
"""Times the weights: they are there twice for a moment while they are loaded."""


def has_room(tier: TierPlan, choice: WholeModel) -> bool:
    """Whether a device may load all layers of its backbone."""
    if choice != "auto":
        return choice == "always"
    free = free_memory_bytes()
    return free == 0 or free >= _NEEDED * tier.whole_bytes


def load_tuned(reference: str, bundle: AdapterBundle, tier: TierPlan) -> Whole:
    """All layers with the adapters in them.

    Args:
        reference: Where the backbone is.
        bundle: All that answers take.
        tier: Says which backbone it must be.

    Raises:
        BackboneError: it cannot be loaded, or is another one.
        DecodeError: the adapters are none of its.
    """
    about = bundle.about
    purpose = about.task if TASKS[about.task].generates else Task.TEXT_CLASSIFICATION
    backbone = shared_backbone(reference, 0, "f32", purpose, runtime="torch")
    backbone.check(tier.whole_fingerprint)
    return whole_model(backbone, about.lora, about.task, len(about.labels), bundle.tensors)
