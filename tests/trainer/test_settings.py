"""A wrong trainer.toml is told in one line that names the field, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from contract.errors import ConfigError, SidestreamError
from host.toml import load_config
from side_trainer.config import TrainerConfig


@pytest.mark.parametrize(
    ("text", "field", "told"),
    [
        ("", "job", "is missing"),
        ('job = "a"\n[learner]\nlearning_rate = inf', "learner.learning_rate", "finite"),
        ('job = "a"\n[learner]\nclip_norm = nan', "learner.clip_norm", "finite"),
        ('job = "a"\n[learner]\nlearning_rat = 1.0', "learner.learning_rat", "did you mean 'learning_rate'"),
        ('job = "a"\n[tiers.pi]\nlayers = -1', "tiers.pi.layers", ">= 0"),
        ('job = "a"\n[tiers.pi]\ncodec = "int5"', "tiers.pi.codec", "'int4'"),
        ('job = "a"\n[tiers.pi]\nbackbon = "x"', "tiers.pi.backbon", "did you mean 'backbone'"),
        ('job = "a"\ntiers = 3', "tiers", "expected object"),
        ('job = "a"\n[tiers]\npi = 3', "tiers.pi", "expected object"),
        ('job = "a"\nlabels = ["x", 3]', "labels[1]", "expected str"),
        ('job = "a"\n[flow]\nwindow = 0', "flow.window", ">= 1"),
        ('job = "a', "t.toml", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, field: str, told: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(TrainerConfig, path)
    assert caught.value.field.endswith(field) and told in str(caught.value)


def test_parts_that_do_not_fit_together_are_told(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text('job = "a"\nlabels = ["x", "x"]')
    with pytest.raises(SidestreamError, match="same name"):
        load_config(TrainerConfig, path).checked()
