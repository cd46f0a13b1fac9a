"""Settings that no model can be split by are refused by name, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from side_trainer.settings.implied import with_implied
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import ConfigError
from sidestream.contract.plan import SplitFrozen, SplitLora
from sidestream.contract.tensors import Codec


def read(**settings: Any) -> TrainerConfig:
    given = {"job": "j", "method": "split-lora", **settings}
    return msgspec.convert(with_implied(given), TrainerConfig).checked()


def test_what_is_not_said_is_what_the_lab_found_good() -> None:
    settings = read()
    plan, tier = settings.method_plan(), settings.tier_plan("generic")
    assert isinstance(plan, SplitLora) and (plan.adapters, plan.window, plan.passes) == ("held", 2, 3)
    assert (tier.layers, tier.sampling, tier.codec, tier.ladder) == (1, "all", Codec.INT4, ())
    assert plan.change_bits == 2
    assert settings.learner.learning_rate == 1e-3 and settings.learner.prior_correction == 0.5
    frozen = read(method="split-frozen")
    assert isinstance(frozen.method_plan(), SplitFrozen) and frozen.learner.prior_correction == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"split": {"passes": 1}},
        {"split": {"change_bits": 0}},
        {"task": "causal-lm"},
        {"method": "split-frozen"},
        {"tiers": {"generic": {"codec": "int8"}}},
    ],
)
def test_four_bits_are_for_what_later_passes_mend(settings: dict[str, Any]) -> None:
    assert read(**settings).tiers["generic"].codec is Codec.INT8


def test_a_language_model_learns_its_adapters_faster_and_in_step() -> None:
    settings = read(task="causal-lm")
    plan = settings.method_plan()
    assert isinstance(plan, SplitLora) and plan.window == 1
    assert settings.learner.learning_rate == 4e-3 and settings.tiers["generic"].max_tokens == 256
    assert settings.learner.weight_decay == 0.01, "the rest is the method's"
    said = read(task="causal-lm", split={"window": 2}, learner={"learning_rate": 1e-3})
    assert said.learner.learning_rate == 1e-3 and said.split.window == 2


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("task", {"task": "token-classification"}),
        ("tiers", {"tiers": {"a": {"backbone": "x"}, "b": {"backbone": "y"}}}),
        ("tiers.a.precision", {"tiers": {"a": {"precision": "int8"}}}),
        ("tiers.a", {"tiers": {"a": {"layers": 2}}}),
        ("tiers.a", {"tiers": {"a": {"taps": (1,)}}}),
        ("tiers.a.sampling", {"tiers": {"a": {"sampling": "mean"}}}),
        ("split", {"split": {"targets": ("not a name!",)}}),
    ],
)
def test_what_cannot_be_split_is_named(field: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        read(**settings)
    assert refused.value.field == field


def test_a_journal_stays_with_its_form_and_may_change_its_pace(tmp_path: Path) -> None:
    from side_trainer.job import _form

    one = read().method_plan()
    assert _form(one) == _form(read(split={"passes": 5, "window": 4}).method_plan())
    assert _form(one) != _form(read(split={"adapters": "local"}).method_plan())
    assert _form(one) != _form(read(split={"rank": 4}).method_plan())
    assert _form(one) != _form(read(method="fed-mobillm").method_plan())
