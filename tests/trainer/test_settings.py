"""A wrong trainer.toml is told in one line that names the field, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from side_trainer.settings.reload import SettingsFile
from sidestream.contract.errors import ConfigError, SidestreamError
from sidestream.contract.tensors import Codec


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
        ('job = "a"\nmethod = "mobilm"', "method", "'mobillm'"),
        ('job = "a"\nmethod = ["mobillm"]', "method", "write one of"),
        ('job = "a"\nmethod = "mobillm"\ntiers = 3', "tiers", "expected object"),
        ('job = "a"\nmethod = "mobillm"\n[tiers]\npi = 3', "tiers.pi", "expected object"),
        ('job = "a', "t.toml", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, field: str, told: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        SettingsFile(path).load()
    assert caught.value.field.endswith(field) and told in str(caught.value)


def test_parts_that_do_not_fit_together_are_told(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text('job = "a"\nlabels = ["x", "x"]')
    with pytest.raises(SidestreamError, match="same name"):
        SettingsFile(path).load()


def test_one_devices_method_fills_in_what_the_settings_leave_out_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text('job = "a"\nmethod = "mobillm"\n[tiers.pi]\n[tiers.own]\nsampling = "mean"\n')
    config = SettingsFile(path).load()
    assert (config.tiers["pi"].sampling, config.tiers["pi"].codec) == ("all", Codec.NF4)
    assert (config.tiers["own"].sampling, config.tiers["own"].codec) == ("mean", Codec.NF4)
    assert config.label_wait_s == 2.0
    assert SettingsFile(path, {"label_wait_s": "9"}).load().label_wait_s == 9.0
    path.write_text('job = "a"\nmethod = "mobillm"\n')
    assert SettingsFile(path).load().tiers["generic"].sampling == "all"
    path.write_text('job = "a"\n')
    fleet = SettingsFile(path).load()
    assert (fleet.method, fleet.tiers["generic"].to_plan().sampling, fleet.label_wait_s) == (
        "fed-mobillm",
        "segments:4",
        20.0,
    )


def test_a_tasks_defaults_come_before_a_methods(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text('job = "a"\ntask = "causal-lm"\nmethod = "mobillm"\n[learner]\npasses = 5\n')
    config = SettingsFile(path).load()
    assert (config.tiers["generic"].codec, config.tiers["generic"].batch_size) == (Codec.INT8, 8)
    assert (config.learner.passes, config.learner.replay, config.side_network.width) == (5, 1, 256)


@pytest.mark.parametrize(
    ("task", "apart"),
    [("text-classification", 3), ("multi-label-classification", 3), ("regression", 0), ("causal-lm", 0)],
)
def test_blocks_stand_apart_where_halves_of_answers_can_be_added(
    tmp_path: Path, task: str, apart: int
) -> None:
    path = tmp_path / "t.toml"
    path.write_text(f'job = "a"\ntask = "{task}"\n')
    assert SettingsFile(path).load().side_network.apart == apart
