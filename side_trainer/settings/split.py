"""How a model is split and tuned: the table ``[split]``, and what of the other settings goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

import msgspec

from sidestream.contract.errors import ConfigError, WireError
from sidestream.contract.lora import MAX_RANK, LoraSpec
from sidestream.contract.messages import MAX_SLOTS
from sidestream.contract.plan import MethodPlan, RoundPlan
from sidestream.contract.tasks import TASKS, Modality, Task
from sidestream.contract.wire import prepared


@prepared
class SplitConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is split and tuned; the table ``[split]``."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)] = 8
    """Of the adapters: the inner width r."""
    alpha: Annotated[float, msgspec.Meta(gt=0, le=4096)] = 16.0
    """What an adapter adds is scaled by this over the rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear maps that get one, such as ["query", "value"]; default: peft's table."""
    adapters: Literal["held", "local"] = "held"
    """split-lora: who keeps the devices' adapters. held: the trainer, one set for all; local, the paper's
    form: each device its own, averaged in rounds."""
    upper: Literal["shared", "per-device"] = "shared"
    """With local adapters: whether the trainer's layers have one set for all devices, or one for each."""
    passes: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    """split-lora: how often devices send their samples."""
    window: Annotated[int, msgspec.Meta(ge=1, le=MAX_SLOTS)] = 2
    """split-lora: batches that a device may have unanswered. 1, a language model's default, keeps it in step
    with the trainer."""
    reuse_below: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.05
    """split-lora: activations that moved by less than this share since they were sent are not sent again."""
    change_bits: Literal[0, 2, 4, 8] = 2
    """split-lora: from the second pass on, activations are sent as their change since they were sent, in so
    many bits a value; 0 sends them whole."""
    round: RoundPlan = RoundPlan()
    """With local adapters: when they are averaged."""

    def plan(self, kind: type[MethodPlan]) -> MethodPlan:
        """What of these a method's part of the plan has.

        Raises:
            DecodeError: a value is none that a plan may have.
        """
        given = {
            "lora": LoraSpec(rank=self.rank, alpha=self.alpha, targets=self.targets),
            **{name: getattr(self, name) for name in ("adapters", "upper", "passes", "window", "round")},
            "reuse_below": self.reuse_below,
            "change_bits": self.change_bits,
        }
        return kind(**{name: given[name] for name in kind.__struct_fields__})


@prepared
class PredictConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the trainer does for devices that cannot predict; the table ``[predict]``."""

    remote: bool = False
    """In a split job, whether the trainer predicts for devices that have no room for the whole model and ask
    it to. It gets what their layers make of the texts, from which the texts can be read."""
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2
    """As long as there is something to learn, answers take at most this share of the trainer's time."""


class Splits(Protocol):
    """What of the trainer's settings goes with a split."""

    @property
    def task(self) -> Task: ...

    @property
    def method(self) -> str: ...

    @property
    def tiers(self) -> Mapping[str, Any]: ...

    def method_plan(self) -> MethodPlan: ...


def check_split(config: Splits) -> None:
    """See that a model can be split as the settings say.

    Raises:
        ConfigError: naming the field by which it cannot.
    """
    if TASKS[config.task].modality is not Modality.TEXT:
        raise ConfigError(
            "task",
            f"{config.task.value} is not learnt by {config.method}; use fed-mobillm or mobillm",
        )
    if config.task is Task.TOKEN_CLASSIFICATION:
        raise ConfigError("task", f"{config.task.value} is not learnt by {config.method}; use fed-mobillm")
    for name in ("keep_days", "keep_gib", "keep_samples"):
        if getattr(config, name):
            raise ConfigError(name, f"{config.method} keeps all batches; leave it out")
    references = sorted({tier.head or tier.backbone for tier in config.tiers.values()})
    if len(references) > 1:
        raise ConfigError(
            "tiers", f"{config.method} has one backbone for all tiers, not {', '.join(references)}"
        )
    for name, tier in config.tiers.items():
        if tier.precision == "int8" and config.method == "split-lora":
            raise ConfigError(
                f"tiers.{name}.precision", "int8 lets no gradient through; use f32 or bf16, or split-frozen"
            )
        if tier.layers or tier.taps or tier.ladder:
            raise ConfigError(
                f"tiers.{name}", f"{config.method} goes by cut; leave out layers, taps and ladder"
            )
        if tier.sampling not in ("", "all"):
            raise ConfigError(f"tiers.{name}.sampling", f"{config.method} needs every token; leave it out")
    try:
        config.method_plan()
    except WireError as exc:
        raise ConfigError("split", str(exc)) from exc
