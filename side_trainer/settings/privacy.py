"""What ``privacy`` in trainer.toml makes of a tier's plan, and with which other settings it does not go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from sidestream.contract.errors import ConfigError
from sidestream.contract.plan import METHODS, Split, TierPlan
from sidestream.contract.privacy import NO_PRIVACY, Privacy
from sidestream.contract.sampling import Rung
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.tensors import Codec

_CODECS: Final = (Codec.INT8, Codec.INT4, Codec.INT2)


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


def check_privacy(privacy: Privacy, method: str, task: Task, sampled: Mapping[str, str]) -> None:
    """Refuse a setting that would not do what it says.

    Args:
        privacy: It.
        method: The job's.
        task: The job's.
        sampled: By tier that says itself which vectors travel, the field it says it in.

    Raises:
        ConfigError: naming the field.
    """
    if privacy == NO_PRIVACY:
        return
    if issubclass(METHODS[method], Split):
        raise ConfigError("privacy", f"{method} sends every token of its cut as it is; leave it out")
    if str(privacy) and TASKS[task].generates:
        raise ConfigError("privacy", f"{task.value} needs vectors as they are; leave sketch and noise out")
    for name, field in sampled.items() if privacy.sampling else ():
        raise ConfigError(
            "privacy",
            f"says which vectors travel, and tiers.{name}.{field} does too, or the method or the task "
            "implies it; leave one of them out",
        )
    if privacy.sampling and TASKS[task].per_vector:
        raise ConfigError(
            "privacy", f"{task.value} has an answer for every vector; leave {privacy.sampling} out"
        )
