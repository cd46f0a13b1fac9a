"""``privacy`` in trainer.toml: what devices are told, and with which settings it does not go."""

from __future__ import annotations

from pathlib import Path

import pytest

from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import ConfigError


def load(folder: Path, text: str) -> TrainerConfig:
    """Settings of a file."""
    path = folder / "t.toml"
    path.write_text(f'job = "a"\n{text}')
    return SettingsFile(path).load()


def test_devices_are_told_by_the_plan(tmp_path: Path) -> None:
    config = load(tmp_path, 'privacy = "deep:2, mean, sketch:32, noise:1.5"')
    plan = config.tier_plan("generic")
    assert (plan.sampling, plan.privacy) == ("mean", "sketch:32, noise:1.5")
    assert config.taps_of("generic", 6) == (4, 6)
    assert {rung.sampling for rung in plan.ladder} == {"mean"}, (
        "a budget's richest rung would send every token"
    )


def test_without_it_plans_are_as_ever(tmp_path: Path) -> None:
    plan = load(tmp_path, "").tier_plan("generic")
    assert (plan.sampling, plan.privacy, plan.ladder) == ("segments:4", "", ())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('privacy = "quiet"', "deep:2"),
        ('privacy = "noise:1"\nmethod = "split-lora"', "split-lora"),
        ('privacy = "noise:1"\ntask = "causal-lm"', "causal-lm"),
        ('privacy = "mean"\n[tiers.pi]\nsampling = "all"', "tiers.pi.sampling"),
        ('privacy = "mean"\nmethod = "mobillm"', "implies"),
        ('privacy = "mean"\ntask = "token-classification"', "token-classification"),
    ],
)
def test_what_does_not_go_with_it_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match="privacy") as caught:
        load(tmp_path, text)
    assert told in str(caught.value)
