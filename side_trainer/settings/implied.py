"""What a job's task and method imply where its settings say nothing. Pure.

Fed MobiLLM, for a fleet, is what every setting's own default stands for. MobiLLM (arXiv 2502.20421, with the
cached activations of PAE MobiLLM, 2507.01216) has one device and one server, which is a fleet of one: the
same code. That device uploads every token at low bit, as the paper does, since nobody shares the uplink; its
labels are the job's, so nobody else is waited for. The split methods train adapters within the model,
whatever the task: at lower rates, and with little decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, get_args

from side_trainer.settings.tier import TierConfig
from sidestream.backbone.codebook_file import SHIPPED, shipped
from sidestream.contract.plan import METHODS
from sidestream.contract.tasks import Task

MethodName: TypeAlias = Literal["fed-mobillm", "mobillm", "split-lora", "split-frozen"]
Implied: TypeAlias = Mapping[str, Any]
"""Settings, and tables of settings; those of ``tiers`` are of each tier."""

_OF_TASK: Final[Mapping[object, Implied]] = {
    Task.CAUSAL_LM.value: {
        "publish_gain": 0.01,  # what it begins with answers well already
        "weights_codec": "int8",  # what packing costs is known of labels only
        "tiers": {"sampling": "all", "codec": "int8", "batch_size": 8, "max_tokens": 256},
        "side_network": {"apart": 0},
        "learner": {
            "learning_rate": 2e-3,
            "weight_decay": 0.05,
            "dropout": 0.0,
            "label_smoothing": 0.0,
            "replay": 1,
            "replay_rows": 2,
            "passes": 2.0,
            "pass_rows": 8,
        },
    },
    Task.IMAGE_CLASSIFICATION.value: {
        "tiers": {"max_tokens": 4096},  # an image is never cut: models differ in how many patches they see
    },
    Task.REGRESSION.value: {
        "weights_codec": "int8",
        "side_network": {"apart": 0},  # half a number and another are not their mean
    },
}
_SPLIT: Final[Implied] = {
    "tiers": {"sampling": "all", "codec": "int8"},
    "publish_change": 0.2,
    "publish_share": 0.0,  # devices learn by passing versions
    "publish_gain": 0.0,
    "weights_codec": "int8",
    "publish_every_s": 0.2,
}
_SPLIT_LEARNER: Final[Implied] = {
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "warmup_updates": 20,
    "final_rate": 0.05,
    "label_smoothing": 0.0,
    "prior_correction": 0.5,
}
_OF_METHOD: Final[Mapping[object, Implied]] = {
    "fed-mobillm": {},
    "mobillm": {"label_wait_s": 2.0, "tiers": {"sampling": "all", "codec": "nf4"}},
    "split-lora": {**_SPLIT, "learner": _SPLIT_LEARNER},
    "split-frozen": {**_SPLIT, "learner": {**_SPLIT_LEARNER, "prior_correction": 1.0, "passes": 2.0}},
}
_OF_BOTH: Final[Mapping[str, Implied]] = {
    f"split-lora, {Task.CAUSAL_LM.value}": {"split": {"window": 1}, "learner": {"learning_rate": 4e-3}},
}
"""By method and task: a language model learns its adapters at a rate at which late gradients do harm."""
_CHANGED_CODEC: Final = "int4"
"""Of split-lora's tiers where later passes send changes: these mend what the first one loses. A language
model loses nearly a fifth of its gain by it."""
_OF_CODEBOOKS: Final[Mapping[object, Implied]] = {
    "fed-mobillm": {"codec": "pq2"},
    "mobillm": {"codec": "pq1"},
}
"""Of a tier for whose backbone there are codebooks, in a job that learns labels or numbers of texts."""
_MEASURED: Final = ("fed-mobillm", Task.TEXT_CLASSIFICATION.value)
"""Where those that are shipped are the default, unless the job asks for privacy."""
_METHOD_FIRST: Final = ("split-lora", "split-frozen")
"""What their tasks imply beside is for side-networks."""
if not METHODS.keys() == _OF_METHOD.keys() == set(get_args(MethodName)):  # pragma: no cover
    raise AssertionError("every method of a plan needs a name here, and what it implies")


def with_implied(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they were given, completed by what their task and their method imply.

    What is of a wrong type is left for the settings' own types to refuse.
    """
    settings = _with_changes(_with_codebooks(settings))
    order = [("task", _OF_TASK), ("method", _OF_METHOD)]
    if settings.get("method") in _METHOD_FIRST:
        order.reverse()
    both = f"{settings.get('method')}, {settings.get('task')}"
    settings = _completed(settings, _OF_BOTH.get(both, {}))
    for field, implied in order:
        value = settings.get(field)
        settings = _completed(settings, implied.get(value, {}) if isinstance(value, str) else {})
    return settings


def _with_codebooks(settings: dict[str, Any]) -> dict[str, Any]:
    """Complete the tiers that say no codec, where there are codebooks for their backbone."""
    tiers, task = settings.get("tiers", {"generic": {}}), settings.get("task", Task.TEXT_CLASSIFICATION.value)
    method = settings.get("method", "fed-mobillm")
    if not isinstance(tiers, dict) or task == Task.CAUSAL_LM.value or not isinstance(method, str):
        return settings
    implied = _OF_CODEBOOKS.get(method, {})
    if task == Task.TOKEN_CLASSIFICATION.value and implied:  # every word travels
        implied = {"codec": "pq1"}
    measured = (method, task) == _MEASURED and not settings.get("privacy")
    found = {
        name: _merged({**implied, "codebooks": SHIPPED}, tier)
        if implied and isinstance(tier, dict) and "codec" not in tier and _has_codebooks(tier, measured)
        else tier
        for name, tier in tiers.items()
    }
    return {**settings, "tiers": found}


def _has_codebooks(tier: Mapping[str, Any], shipped_too: bool) -> bool:
    """Whether a tier names some, or is to have the shipped ones."""
    if "codebooks" in tier:
        return bool(tier["codebooks"])
    backbone = tier.get("backbone", TierConfig().backbone)
    return shipped_too and isinstance(backbone, str) and shipped(backbone) is not None


def _with_changes(settings: dict[str, Any]) -> dict[str, Any]:
    """Complete the tiers of a job whose batches come again as changes."""
    split, tiers = settings.get("split", {}), settings.get("tiers", {"generic": {}})
    if settings.get("method") != "split-lora" or settings.get("task") == Task.CAUSAL_LM.value:
        return settings
    if not isinstance(split, dict) or not isinstance(tiers, dict):
        return settings
    if split.get("passes") == 1 or split.get("change_bits") == 0:
        return settings
    implied = {"codec": _CHANGED_CODEC}
    return {**settings, "tiers": {name: _merged(implied, tier) for name, tier in tiers.items()}}


def _completed(settings: dict[str, Any], implied: Implied) -> dict[str, Any]:
    completed = {**implied, **settings}
    for name, table in implied.items():
        given = settings.get(name, {"generic": {}} if name == "tiers" else {})
        if not isinstance(table, Mapping):
            continue
        if name != "tiers":
            completed[name] = _merged(table, given)
        elif isinstance(given, dict):
            completed[name] = {tier: _merged(table, own) for tier, own in given.items()}
    return completed


def _merged(table: Implied, given: object) -> object:
    return {**table, **given} if isinstance(given, dict) else given
