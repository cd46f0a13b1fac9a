"""The plan: everything a device must know of a job, retained at ``<job>/plan``.

A tier's ``depth``, ``width`` and ``fingerprint`` and, unless given, the job's labels are learnt from the
first devices and then fixed. A device may compute for the job once its tier is *settled* and the labels are
fixed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from sidestream.contract.errors import ConfigError, DecodeError
from sidestream.contract.lora import LoraSpec
from sidestream.contract.messages import MAX_LABELS, MAX_SLOTS, Count, ShortText, check_labels, check_stream
from sidestream.contract.privacy import parse_privacy
from sidestream.contract.sampling import (
    CODED_LADDER,
    DEFAULT_LADDER,
    MAX_RUNGS,
    TOKEN_LADDER,
    Assignable,
    Rung,
    parse_sampling,
)
from sidestream.contract.signing import MAX_KEYS, PublicKey
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.tensors import Codec
from sidestream.contract.topics import check_name
from sidestream.contract.wire import Message, prepared

MAX_TIERS: Final = 64
_CODEBOOKS: Final = re.compile(r"([0-9a-f]{32})?")
Precision: TypeAlias = Literal["f32", "bf16", "int8"]


@prepared
class TierFacts(Message, frozen=True, kw_only=True):
    """What is fixed of a tier once its first device has come; in the plan, and in the journal."""

    align: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] = "default"
    """Tiers with the same name share one alignment map into the side-network; they need equal widths."""
    depth: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    """Layers in use, learnt from the first device; 0 until then."""
    width: Annotated[int, msgspec.Meta(ge=0, le=65536)] = 0
    """Hidden size, learnt from the first device; 0 until then."""
    taps: Annotated[tuple[int, ...], msgspec.Meta(max_length=256)] = ()
    """Layers to tap, ascending, 1 = the first layer's output; decided once the depth is known."""
    fingerprint: ShortText = ""
    """Of the backbone's weights, given or learnt from the first device; devices with others are refused."""
    head: ShortText = ""
    """Of the output head that the trainer learns with, its fingerprint; a language model's tiers have one."""
    vocabulary: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 0
    """Tokens that it can predict."""
    whole_depth: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    """Layers of the whole model, where the device has only the first ``depth`` of them; 0 elsewhere."""
    whole_fingerprint: ShortText = ""
    """Of the whole model's weights, for devices that have room for it."""
    whole_bytes: Count = 0
    """What they take in f32."""
    gradient_codec: Codec = Codec.INT8
    """How gradients travel, where devices get any."""
    codebooks: ShortText = ""
    """The id of its taps' codebooks for product quantisation, 32 hex digits; empty where it has none."""

    @property
    def codebooks_id(self) -> bytes:
        """The same, as tensors name it."""
        return bytes.fromhex(self.codebooks)

    def facts(self) -> dict[str, Any]:
        """These, by name."""
        return {name: getattr(self, name) for name in TierFacts.__struct_fields__}


@prepared
class TierPlan(TierFacts, frozen=True, kw_only=True):
    """What the devices of one tier do."""

    backbone: ShortText
    """Reference to the frozen model: ``package:<name>``, a local folder, or a hub name."""
    layers: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    """Use only the first so many layers; 0 for all."""
    sampling: ShortText = "segments:4"
    """Token-sampling policy."""
    codec: Codec = Codec.INT4
    """How activations are quantised."""
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=256)] = 16
    """Samples a message."""
    max_tokens: Annotated[int, msgspec.Meta(ge=4, le=4096)] = 128
    """Longer samples are cut."""
    ladder: Annotated[tuple[Rung, ...], msgspec.Meta(max_length=MAX_RUNGS)] = ()
    """Ways to send, the richest first, for devices that have a byte budget; the others send by
    ``sampling`` and ``codec``. Empty: :data:`DEFAULT_LADDER`, or :data:`TOKEN_LADDER`."""
    precision: Precision = "f32"
    """How devices keep the backbone in memory: int8 quantises its linear layers dynamically. The fingerprint
    is that of the weights as they were loaded, whatever the precision."""
    privacy: ShortText = ""
    """What is done to vectors before they are stored or sent: sketch and noise of
    :mod:`sidestream.contract.privacy`."""
    assignable: Assignable | None = None
    """What the trainer may assign to single devices; None where it assigns nothing."""

    def __post_init__(self) -> None:
        try:
            parse_sampling(self.sampling)
            parse_privacy(self.privacy)
            check_name("align", self.align)
        except ConfigError as exc:
            raise DecodeError(str(exc)) from exc
        if not _CODEBOOKS.fullmatch(self.codebooks):
            raise DecodeError("codebooks are named by 32 hex digits")
        assigned = self.assignable.rungs if self.assignable is not None else ()
        codecs = (self.codec, *(rung.codec for rung in (*self.ladder, *assigned)))
        coded = [codec for codec in codecs if codec.stages]
        if coded and self.depth and not self.codebooks:
            raise DecodeError(f"{coded[0].value} takes codebooks; name a file of them with codebooks")
        if self.gradient_codec.stages:
            raise DecodeError(
                f"gradients have no codebooks, and cannot travel as {self.gradient_codec.value}"
            )
        if list(self.taps) != sorted(set(self.taps)) or any(not 1 <= tap <= self.depth for tap in self.taps):
            raise DecodeError(f"taps {list(self.taps[:16])} must ascend within layers 1 to {self.depth}")

    def rungs(self, task: Task) -> tuple[Rung, ...]:
        """What its devices choose from if they have a byte budget."""
        if self.ladder:
            return self.ladder
        if TASKS[task].generates:
            return TOKEN_LADDER
        return CODED_LADDER if self.codebooks else DEFAULT_LADDER

    def policies(self, task: Task) -> frozenset[str]:
        """The token-sampling policies that its devices may send by."""
        assigned = self.assignable.rungs if self.assignable is not None else ()
        return frozenset({self.sampling, *(rung.sampling for rung in (*self.rungs(task), *assigned))})

    @property
    def settled(self) -> bool:
        """Whether depth, width, taps and fingerprint are known."""
        return self.depth > 0 and self.width > 0 and self.fingerprint != "" and self.taps != ()


@prepared
class SideNetworkSpec(Message, frozen=True, kw_only=True):
    """The shape of the side-network (see :mod:`sidestream.side_network.network`)."""

    blocks: Annotated[int, msgspec.Meta(ge=1, le=256)] = 3
    """B: the most taps of a tier, each with an alignment map and an adapter of its own."""
    width: Annotated[int, msgspec.Meta(ge=1, le=8192)] = 256
    """d_s: its hidden size."""
    inner: Annotated[int, msgspec.Meta(ge=1, le=32768)] = 256
    """Inner width of an adapter."""
    apart: Annotated[int, msgspec.Meta(ge=0, le=256)] = 3
    """Blocks from this number on stand apart: each sees its own tap alone, adds half of what it answers, and
    learns to answer by itself too; 0 for none."""


@prepared
class FlowPlan(Message, frozen=True, kw_only=True):
    """How fast devices may send, and when they repeat themselves."""

    window: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8
    """Batches a device may have published without a receipt."""
    retry_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 10.0
    """Send a batch again when no receipt came for so long."""


@prepared
class SideTuning(Message, frozen=True, kw_only=True):
    """What the methods have in common that train a side-network beside frozen backbones, and nothing else.

    Their part of the plan is :attr:`Plan.side_network` and, of each tier, taps and how they travel.
    """

    def is_ready(self, tier: TierPlan, task: Task) -> bool:
        """Whether devices of a settled tier may compute: a language model's need a known output head too."""
        return tier.head != "" or not TASKS[task].generates

    def needs_head(self, task: Task) -> bool:
        """Whether devices load the backbone's own output head."""
        return TASKS[task].generates

    def awaits_cut(self, tier: TierPlan) -> bool:
        """Whether it has yet to be said how many layers devices load."""
        return False


@prepared
class FedMobiLLM(SideTuning, frozen=True, kw_only=True, tag_field="name", tag="fed-mobillm"):
    """A fleet uploads sampled, quantised activations once; the trainer learns one side-network from them."""


@prepared
class MobiLLM(SideTuning, frozen=True, kw_only=True, tag_field="name", tag="mobillm"):
    """The same with one device (MobiLLM, arXiv 2502.20421; its cached activations: 2507.01216)."""


@prepared
class Split(Message, frozen=True, kw_only=True):
    """What the methods have in common that cut a model in two.

    The device has the embeddings and the first layers, as many as its tier says; the trainer has all of it
    once, with LoRA and an output head.
    """

    lora: LoraSpec = LoraSpec()
    """The adapters."""

    def is_ready(self, tier: TierPlan, task: Task) -> bool:
        """Whether devices of a settled tier may compute."""
        return tier.whole_depth > tier.depth

    def needs_head(self, task: Task) -> bool:
        """Whether devices load the backbone's own output head."""
        return False

    def awaits_cut(self, tier: TierPlan) -> bool:
        """Whether it has yet to be said how many layers devices load."""
        return tier.layers == 0 and tier.depth == 0


@prepared
class RoundPlan(Message, frozen=True, kw_only=True):
    """When devices' own adapters are averaged (the local form of :class:`SplitLora`)."""

    batches: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 8
    """Steps that a device makes between two averagings, or as many as it has left."""
    devices: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1
    """Wait for so many at least."""
    quorum: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    """Once the deadline has passed: wait until uploads are of this share of the round's samples."""
    deadline_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    """From a round's first upload on, wait so long for the other devices that take part in it."""
    learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 1e-3
    """Of devices' own AdamW, which begins anew with every round."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    """Likewise."""
    clip_norm: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Devices' gradients are clipped to this norm."""
    final_rate: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    """The learning rate falls to this share of itself over a device's passes."""


@prepared
class SplitLora(Split, frozen=True, kw_only=True, tag_field="name", tag="split-lora"):
    """Memory-efficient split federated LoRA (arXiv 2506.02940): batches are answered with gradients."""

    adapters: Literal["held", "local"] = "held"
    """Who keeps the devices' adapters. ``held``: the trainer, one set for all; a device returns their
    gradient. ``local``, the paper's form: each device its own, and they are averaged in rounds."""
    upper: Literal["shared", "per-device"] = "shared"
    """In the local form: one set of the trainer's adapters, or one a device, averaged as theirs."""
    passes: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    """How often a device sends its samples."""
    window: Annotated[int, msgspec.Meta(ge=1, le=MAX_SLOTS)] = 2
    """Batches that a device may have unanswered. With 1 it is in step with the trainer."""
    reuse_below: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.05
    """From pass two on, states that moved by less than this share since they were sent are not sent again."""
    round: RoundPlan = RoundPlan()
    """In the local form: when adapters are averaged."""
    change_bits: Literal[0, 2, 4, 8] = 2
    """The others are sent as their change since then, in so many bits a value; 0 to send them whole."""


@prepared
class SplitFrozen(Split, frozen=True, kw_only=True, tag_field="name", tag="split-frozen"):
    """The device's layers stay as they are (SplitFrozen, arXiv 2503.18986).

    Each sample is sent once, and the trainer learns the layers above the cut from its journal.
    """


MethodPlan: TypeAlias = FedMobiLLM | MobiLLM | SplitLora | SplitFrozen
"""The part of a plan that belongs to its training method, by ``name``."""
METHODS: Final[dict[str, type[MethodPlan]]] = {
    "fed-mobillm": FedMobiLLM,
    "mobillm": MobiLLM,
    "split-lora": SplitLora,
    "split-frozen": SplitFrozen,
}


@prepared
class Plan(Message, frozen=True, kw_only=True):
    """The job, as every device sees it."""

    job: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    """Its name."""
    run: str
    """The trainer's journal id, 32 hex digits."""
    revision: Count
    """Rises with every change within a run."""
    task: Task
    """What is learnt."""
    labels: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_LABELS)]
    """The label names, in index order; empty until they are fixed."""
    tiers: Annotated[dict[str, TierPlan], msgspec.Meta(min_length=1, max_length=MAX_TIERS)]
    """By tier name."""
    side_network: SideNetworkSpec = SideNetworkSpec()
    """The side-network's shape."""
    flow: FlowPlan = FlowPlan()
    """Rates."""
    fence: Count = 0
    """Of the trainer that publishes it; a device that knows of a higher one ignores the plan."""
    keys: Annotated[tuple[PublicKey, ...], msgspec.Meta(max_length=MAX_KEYS)] = ()
    """Public keys that may sign plan and weights from now on: a device that trusts the plan trusts these, and
    no others. Empty where nothing is signed."""
    key_id: ShortText = ""
    """Of the key that signed it (:mod:`sidestream.contract.signing`)."""
    signature: bytes = b""
    """Over all that is before it, for one job."""
    method: MethodPlan = FedMobiLLM()
    """How the job learns."""

    def __post_init__(self) -> None:
        check_stream(self.run)
        check_labels(self.labels)
        try:
            check_name("job", self.job)
            for name in self.tiers:
                check_name("tier", name)
        except ConfigError as exc:
            raise DecodeError(str(exc)) from exc
        for name, tier in self.tiers.items():
            if len(tier.taps) > self.side_network.blocks:
                raise DecodeError(
                    f"tier {name!r} has {len(tier.taps)} taps, more than the side-network's "
                    f"{self.side_network.blocks} blocks"
                )
        by_map: dict[str, int] = {}
        for name, tier in self.tiers.items():
            if tier.settled and by_map.setdefault(tier.align, tier.width) != tier.width:
                raise DecodeError(
                    f"tier {name!r} (width {tier.width}) shares the alignment map {tier.align!r} with a tier "
                    f"of width {by_map[tier.align]}; give it an 'align' of its own"
                )
        heads: dict[str, str] = {}
        for name, tier in self.tiers.items():
            if tier.head and heads.setdefault(tier.align, tier.head) != tier.head:
                raise DecodeError(
                    f"tier {name!r} shares the alignment map {tier.align!r} with a tier of another output "
                    "head; give it an 'align' of its own"
                )

    def ready_for(self, tier: str) -> bool:
        """Whether a device of ``tier`` may compute: labels fixed where the task has any, tier settled."""
        known = self.tiers.get(tier)
        if known is None or not known.settled or self.lacks_labels:
            return False
        return self.method.is_ready(known, self.task)

    @property
    def lacks_labels(self) -> bool:
        """Whether the task's answers have names that are not fixed yet."""
        return TASKS[self.task].named and not self.labels


def labels_id(labels: Sequence[str]) -> str:
    """A short id of a label list: 16 hex digits that change with any name or their order."""
    # With its length before each name, no two lists are written alike.
    written = "".join(f"{len(label)}:{label}" for label in labels)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def tap_layers(depth: int, blocks: int) -> tuple[int, ...]:
    """Taps of a backbone on its own: the last layer of each of ``blocks`` equal parts.

    ``ceil(depth·b/blocks)``, Fed MobiLLM's layer-wise sampling. A backbone with fewer layers than blocks is
    tapped at every layer.
    """
    blocks = min(depth, blocks)
    return tuple(-(-depth * block // blocks) for block in range(1, blocks + 1))


def nested_taps(depth: int, blocks: int, shallowest: int) -> tuple[int, ...]:
    """Taps of one backbone of a family whose shallowest member has ``shallowest`` layers.

    All members tap the same ``blocks - 1`` layers, spread evenly from the first to ``shallowest``; a deeper
    one taps its own last layer too. So a deep member's upload holds what a shallow one would have sent.
    """
    shared = min(blocks - 1, shallowest)
    if shared <= 1:
        anchors = [shallowest] * shared
    else:
        anchors = [1 + round((shallowest - 1) * index / (shared - 1)) for index in range(shared)]
    last = [depth] if depth > shallowest or not anchors else []
    return tuple(sorted({*anchors, *last}))


def joining_taps(depth: int, blocks: int, taps: tuple[int, ...]) -> tuple[int, ...]:
    """Taps of a backbone that joins a family whose fullest member has ``taps`` already.

    Its shared layers, as far as the newcomer has them, and the newcomer's own last.
    """
    return tuple(sorted({*(tap for tap in taps[: blocks - 1] if tap <= depth), depth}))
