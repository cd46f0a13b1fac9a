from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from edge_agent.commands import agent as cli
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.session.machine import detect_tier, machine_id, memory_bytes, temperature_celsius
from sidestream.contract.errors import ConfigError
from sidestream.host.flags import field_help, overrides
from sidestream.host.toml import load_config


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sidestream", allow_abbrev=False)
    cli.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["agent", *arguments])


def config_of(tmp_path: Path, text: str, *flags: str) -> AgentConfig:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    args = parse("run", str(path), *flags)
    return load_config(AgentConfig, args.config, overrides(args))


def test_a_file_and_flags_make_the_settings_and_flags_win(tmp_path: Path) -> None:
    text = 'job = "lights"\ntier = "pi4"\n[data]\npath = "a.csv"\n[broker]\nurl = "mqtt://one"\n'
    flags = ["--broker", "mqtt://two:1884", "--data", "-", "--exit-when-done", "--outbox-max-mib", "7"]
    config = config_of(tmp_path, text, *flags)
    assert (config.job, config.tier, config.data.path) == ("lights", "pi4", "-")
    assert config.broker.url == "mqtt://two:1884" and config.exit_when_done and config.outbox_max_mib == 7


def test_flags_alone_are_enough() -> None:
    args = parse("run", "--job", "lights", "--data", "a.csv", "--label-column", "intent", "--no-watch")
    config = load_config(AgentConfig, args.config, overrides(args))
    assert config.data == DataConfig(path="a.csv", label_column="intent")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "job: is missing"),
        ('job = "a/b"', "job: 'a/b' cannot be part of a topic"),
        ('job = "a"\nteir = "x"', "teir: there is no such setting; did you mean 'tier'"),
        ('job = "a"\n[data]\nlabel_colum = "x"', "data.label_colum: .* did you mean 'label_column'"),
        ('job = "a"\nthreads = "four"', "threads: expected int, got str"),
        ('job = "a"\nthreads = -1', "threads: expected int >= 0"),
        ('job = "a"\nwhen_full = "explode"', "when_full: write one of 'drop_oldest', 'pause'"),
        ('job = "a"\n[data]\nevaluation_part = "3/2"', r"data\.evaluation_part: '3/2' is no part"),
        ('job = "a"\n[data]\npath = "x"\nplugin = "y"', r"data\.plugin: a plug-in replaces data\.path"),
        ("job = a", "agent.toml: is not valid TOML: .*line 1"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, text)


def test_every_setting_has_a_help_text() -> None:
    for kind in (AgentConfig, DataConfig):
        assert set(field_help(kind)) == set(kind.__struct_fields__)


def test_every_setting_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("run", "--help")
    shown = capsys.readouterr().out
    fields = {*AgentConfig.__struct_fields__, *(f"data.{name}" for name in DataConfig.__struct_fields__)}
    for field in fields - {"broker", "data"}:
        assert f"--{field}".replace("_", "-") in shown


def test_no_secret_is_taken_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("run", "--broker.password", "x")
    with pytest.raises(SystemExit):
        parse("run", "--help")
    assert "SIDESTREAM_BROKER_PASSWORD" in capsys.readouterr().out


def test_the_state_directory_is_the_jobs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert AgentConfig(job="lights").state_path == Path("/var/state/sidestream/agent/lights")
    assert AgentConfig(job="lights", state_dir="/x").state_path == Path("/x")


# --- the board -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tier"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0\0", "pi5"),
        ("Raspberry Pi 4 Model B Rev 1.4\0", "pi4"),
        ("Raspberry Pi Compute Module 4 Rev 1.0\0", "pi4"),
        ("NVIDIA Jetson Orin Nano Developer Kit\0", "jetson-orin"),
        ("NVIDIA Jetson Nano Developer Kit\0", "jetson-nano"),
        ("NVIDIA Jetson Xavier NX Developer Kit\0", "jetson-xavier"),
        ("Some Board\0", "generic"),
    ],
)
def test_the_tier_is_that_of_the_board(tmp_path: Path, model: str, tier: str) -> None:
    folder = tmp_path / "proc" / "device-tree"
    folder.mkdir(parents=True)
    (folder / "model").write_text(model)
    assert detect_tier(tmp_path) == tier


def test_a_machine_without_a_board_is_generic(tmp_path: Path) -> None:
    assert detect_tier(tmp_path) == "generic"


def test_the_machine_id_is_stable_hashed_and_tells_cloned_cards_apart(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "machine-id").write_text("0123456789abcdef\n")
    first = machine_id(tmp_path)
    assert first == machine_id(tmp_path) and len(first) == 16 and first != "0123456789abcdef"
    folder = tmp_path / "proc" / "device-tree"
    folder.mkdir(parents=True)
    (folder / "serial-number").write_text("1000000abc\0")
    assert machine_id(tmp_path) != first


def test_memory_and_temperature_are_read_where_they_can_be(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert memory_bytes(status) == (1024 * 1024, 2048 * 1024)
    assert memory_bytes(tmp_path / "none") == (0, 0)
    for zone, text in enumerate(("41500\n", "38000\n", "broken\n", "-274000\n")):
        folder = tmp_path / f"sys/class/thermal/thermal_zone{zone}"
        folder.mkdir(parents=True)
        (folder / "temp").write_text(text)
    assert temperature_celsius(tmp_path) == 41.5 and temperature_celsius(tmp_path / "none") is None
