"""What ``privacy`` in trainer.toml makes of a tier's plan, and with which other settings it does not go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import msgspec

from sidestream.contract.errors import ConfigError
from sidestream.contract.plan import METHODS, Split, TierPlan
from sidestream.contract.privacy import NO_PRIVACY, Privacy, parse_privacy
from sidestream.contract.sampling import Rung
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.tensors import Codec

_CODECS: Final = (Codec.INT8, Codec.INT4, Codec.INT2)


class Uploads(Protocol):
    """What of the trainer's settings says what travels."""

    @property
    def privacy(self) -> str: ...

    @property
    def method(self) -> str: ...

    @property
    def task(self) -> Task: ...

    @property
    def tiers(self) -> Mapping[str, Any]: ...


def under_privacy(plan: TierPlan, privacy: Privacy, task: Task) -> TierPlan:
    """A tier's plan with the setting on it.

    A device with a byte budget then chooses among codecs only: the usual ladder's richest rungs send every
    token.
    """
    if privacy == NO_PRIVACY:
        return plan
    sampling = privacy.sampling or plan.sampling
    ladder = plan.ladder or tuple(Rung(sampling=sampling, codec=codec) for codec in _CODECS)
    return msgspec.structs.replace(plan, sampling=sampling, ladder=ladder, privacy=str(privacy))


def check_privacy(config: Uploads) -> None:
    """Refuse a setting that would not do what it says.

    Raises:
        ConfigError: naming the field.
    """
    privacy = parse_privacy(config.privacy)
    if privacy == NO_PRIVACY:
        return
    if issubclass(METHODS[config.method], Split):
        raise ConfigError("privacy", f"{config.method} sends every token of its cut as it is; leave it out")
    if str(privacy) and TASKS[config.task].generates:
        raise ConfigError(
            "privacy", f"{config.task.value} needs vectors as they are; leave sketch and noise out"
        )
    for name, tier in config.tiers.items():
        if privacy.sampling and (tier.sampling or tier.ladder):
            field = "sampling" if tier.sampling else "ladder"
            raise ConfigError(
                "privacy",
                f"says which vectors travel, and tiers.{name}.{field} does too, or the method or the task "
                "implies it; leave one of them out",
            )
        if privacy.sampling and TASKS[config.task].per_vector:
            raise ConfigError(
                "privacy", f"{config.task.value} has an answer for every vector; leave {privacy.sampling} out"
            )
