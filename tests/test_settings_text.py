"""Settings files and the reference are made from the settings themselves, and say what is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.config import AgentConfig
from side_trainer.settings.implied import with_implied
from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.schema import TrainerConfig
from sidestream.cli import main
from sidestream.configuration_page import page
from sidestream.host.settings_text import reference, settings_file, tables, toml_value
from sidestream.host.toml import load_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

ROOT = Path(__file__).parents[1]
KINDS = pytest.mark.parametrize("kind", [AgentConfig, TrainerConfig])


def uncommented(text: str) -> str:
    """Every setting that is commented out, set."""
    return re.sub(r"^# (\w+ = |\[tiers\.NAME\])", r"\1", text, flags=re.MULTILINE)


@KINDS
def test_a_file_with_everything_commented_out_means_the_defaults(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(settings_file(kind, {"job": "lights"}, "Hello"))
    read = SettingsFile(path).load() if kind is TrainerConfig else load_config(kind, path)
    given: dict[str, Any] = {"job": "lights"}
    assert read == msgspec.convert(with_implied(given) if kind is TrainerConfig else given, kind)


@KINDS
def test_what_is_commented_out_is_the_default(kind: Any) -> None:
    text = uncommented(settings_file(kind, {"job": "lights"}, "Hello"))
    said = tomllib.loads(text.replace("[tiers.NAME]", "[tiers.generic]"))
    assert msgspec.convert(said, type=kind) == kind(job="lights")


@KINDS
def test_every_setting_is_explained_in_file_and_reference(kind: Any) -> None:
    text, listed = settings_file(kind, {"job": "lights"}, "Hello"), reference(kind)
    for table in tables(kind):
        for setting in table.settings:
            assert setting.help, f"{table.name}.{setting.name} has no docstring"
            assert re.search(rf"^#? ?{setting.name} = ", text, re.MULTILINE)
            assert f"| `{setting.name}` |" in listed


def test_what_is_given_is_set_whatever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    labels = ("on", 'a "quoted" \\ one', "größer")
    values = {
        "job": "lights",
        "labels": labels,
        "page": False,
        "publish_every_s": 2.5,
        "tiers.pi5.backbone": "m",
        "tiers.pi4.layers": 4,
        "learner.seed": 7,
    }
    path.write_text(settings_file(TrainerConfig, values, "Hello"))
    config = load_config(TrainerConfig, path)
    assert config.labels == labels and not config.page and config.publish_every_s == 2.5
    assert (config.tiers["pi5"].backbone, config.tiers["pi4"].layers, config.learner.seed) == ("m", 4, 7)


@pytest.mark.parametrize("text", ["", "a\nb", "\t\x00\x7f", 'say "no"', "C:\\x", "größer 日本"])
def test_any_text_survives(text: str) -> None:
    assert tomllib.loads(f"a = {toml_value(text)}") == {"a": text}


def test_the_reference_in_the_docs_is_current() -> None:
    written = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert written == page(), "python -m sidestream.configuration_page > docs/configuration.md"


@pytest.mark.slow
@pytest.mark.parametrize("who", ["agent", "trainer"])
def test_init_writes_a_file_that_check_finds_right(
    who: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "new" / f"{who}.toml")
    assert main([who, "init", path, *["--job", "lights", "--broker", "mqtt://10.0.0.1:1883"]]) == 0
    assert main([who, "run", path, "--check"]) == 0
    assert "lights" in capsys.readouterr().out
    assert main([who, "init", path, "--job", "other"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main([who, "init", path, "--job", "other", "--replace"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "text", "message"),
    [
        ("agent", 'job = "a"\nthread = 4', "did you mean 'threads'"),
        ("agent", 'job = "a"\ntrusted_keys_file = "/none"', "trusted_keys_file: /none cannot be read"),
        ("agent", 'job = "a"\n[broker]\nurl = "mqtts://h"\nca_file = "/none"', "broker.ca_file"),
        ("agent", 'job = "a"\n[data]\npath = "/none"', "data.path"),
        ("trainer", 'job = "a"\n[signing]\nkey_fil = "x"', "did you mean 'key_file'"),
        ("trainer", 'job = "a"\n[signing]\nkey_file = "/none"', "signing.key_file: /none cannot be read"),
        ("trainer", 'job = "a"\nlabels = ["one"]', "labels: one label"),
        ("trainer", 'job = "a"\n[broker]\nurl = "ftp://h"', "broker.url"),
    ],
)
def test_check_names_what_is_wrong(
    who: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    assert main([who, "run", str(path), "--check"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("split.change_bits", "0", 0),
        ("split.change_bits", "8", 8),
        ("learner.passes", "3", 3.0),
        ("split.adapters", "local", "local"),
    ],
)
def test_text_from_a_command_line_is_read_as_its_setting_has_it(name: str, text: str, value: object) -> None:
    config = load_config(TrainerConfig, overrides={"job": "lights", name: text})
    table, _, field = name.partition(".")
    assert getattr(getattr(config, table), field) == value
