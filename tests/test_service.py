"""``sidestream agent install``: a unit that systemd takes, in the right place, and gone again."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from edge_agent.commands import service_state
from edge_agent.commands.service_state import SYSTEM
from edge_agent.commands.setup import service_of
from edge_agent.config import AgentConfig
from edge_agent.store.outbox_file import FILE_NAME
from sidestream.cli import main
from sidestream.host.state_dir import prepare
from sidestream.host.toml import load_config
from sidestream.service import systemd

pytestmark = pytest.mark.slow  # each builds the whole command line


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "a folder" / "agent.toml"
    path.parent.mkdir()
    path.write_text('job = "lights"\n')
    return path


@pytest.mark.parametrize("flags", [(), ("--user",)])
def test_a_unit_is_written_for_another_root_and_taken_away(
    settings: Path, tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/pi/.config")
    root = tmp_path / "root"
    assert main(["agent", "install", str(settings), "--root", str(root), *flags]) == 0
    place = "home/pi/.config/systemd/user" if flags else "etc/systemd/system"
    text = (root / place / "sidestream-agent.service").read_text()
    assert "MALLOC_ARENA_MAX=1" in text and "Restart=on-failure" in text and str(settings) in text
    assert ("ProtectSystem=strict" in text and "User=" in text) != bool(flags)
    assert main(["agent", "uninstall", "--root", str(root), *flags]) == 0
    assert not (root / place / "sidestream-agent.service").exists() and settings.exists()
    assert main(["agent", "uninstall", "--root", str(root), *flags]) == 1


def test_a_dry_run_shows_the_unit_and_writes_nothing(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    assert main(["agent", "install", str(settings), "--root", str(root), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "[Service]" in shown and "StateDirectory=sidestream-agent" in shown and not root.exists()


def _state_of(unit: str) -> tuple[Path, str]:
    """Where the unit has the agent keep its state, and where it lets it write."""
    lines = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    command = shlex.split(lines["ExecStart"])
    return Path(command[command.index("--state-dir") + 1]), lines.get("ReadWritePaths", "")


@pytest.fixture
def by_hand(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state of an agent that was run by hand with these settings."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home" / "state"))
    folder = prepare(load_config(AgentConfig, settings).state_path)
    (folder / FILE_NAME).touch()
    return folder


@pytest.mark.parametrize("flags", [(), ("--user",)])
def test_the_service_goes_on_with_the_state_of_the_agent_run_by_hand(
    settings: Path, by_hand: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    assert main(["agent", "install", str(settings), "--dry-run", *flags]) == 0
    may_write = "" if flags else str(by_hand)
    assert _state_of(capsys.readouterr().out) == (by_hand, may_write)


def test_so_does_one_whose_settings_name_the_folder(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.write_text(f'job = "lights"\nstate_dir = "{tmp_path}/a state"\n')
    assert main(["agent", "install", str(settings), "--dry-run"]) == 0
    assert _state_of(capsys.readouterr().out) == (tmp_path / "a state", f'"{tmp_path}/a state"')


def test_a_folder_that_depends_on_where_the_agent_is_started_is_refused(
    settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.write_text('job = "lights"\nstate_dir = "state"\n')
    assert main(["agent", "install", str(settings), "--dry-run"]) == 1
    assert "state_dir" in capsys.readouterr().err


def test_another_users_state_is_what_a_service_of_theirs_goes_on_with() -> None:
    config, home = AgentConfig(job="lights"), Path(pwd.getpwnam("daemon").pw_dir)
    assert service_state.by_hand(config, "daemon") == home / ".local/state/sidestream/agent/lights"
    below = AgentConfig(job="lights", state_dir="~/mine")
    assert service_state.by_hand(below, "daemon") == home / "mine"


def test_a_service_of_somebody_else_does_not_begin_anew_in_silence(
    settings: Path, by_hand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["agent", "install", str(settings), "--dry-run", "--run-as", "daemon"]
    assert main(command) == 1
    assert f"--state-dir {by_hand}" in capsys.readouterr().err
    assert main([*command, "--state-dir", str(by_hand)]) == 0
    assert _state_of(capsys.readouterr().out)[0] == by_hand


def test_its_folder_is_made_for_its_owner_only(settings: Path, tmp_path: Path) -> None:
    root, state = tmp_path / "root", Path("/home/pi/deep/state")
    command = ["agent", "install", str(settings), "--root", str(root), "--state-dir", str(state)]
    assert main(command) == 0
    made = root / state.relative_to("/")
    assert made.is_dir() and stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
@pytest.mark.parametrize("for_user", [False, True])
def test_systemd_finds_nothing_wrong_with_it(settings: Path, tmp_path: Path, for_user: bool) -> None:
    unit = tmp_path / "sidestream-agent.service"
    unit.write_text(service_of(settings, SYSTEM, for_user=for_user).text())
    mode = ["--user"] if for_user else []
    done = subprocess.run(
        ["systemd-analyze", *mode, "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "XDG_RUNTIME_DIR": str(tmp_path),
            "HOME": str(tmp_path),
        },
        check=False,
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "sidestream-agent.service" in line]
    assert not said and (done.returncode == 0 or not said), done.stderr


def test_a_wrong_option_would_be_found(settings: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    unit = tmp_path / "sidestream-agent.service"
    text = service_of(settings, SYSTEM, for_user=False).text()
    unit.write_text(text.replace("NoNewPrivileges=yes", "NoNewPrivilegez=yes"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert "NoNewPrivilegez" in done.stderr


def test_where_there_is_no_systemd_it_says_what_to_run_instead(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["agent", "install", str(settings)]) == 1
    said = capsys.readouterr().err
    assert "systemd does not run this machine" in said and f"agent run '{settings}'" in said


def test_settings_that_are_wrong_are_not_installed(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.write_text('job = "lights"\nthreds = 1\n')
    assert main(["agent", "install", str(settings), "--root", str(tmp_path / "root")]) == 1
    assert "did you mean 'threads'" in capsys.readouterr().err
    assert main(["agent", "install", str(tmp_path / "none.toml"), "--root", str(tmp_path / "root")]) == 1
    settings.write_text('job = "lights"\n')
    arguments = [
        "agent",
        "install",
        str(settings),
        "--root",
        str(tmp_path / "root"),
        "--run-as",
        "nobody-here",
    ]
    assert main(arguments) == 1
    assert "--run-as" in capsys.readouterr().err


def test_words_of_a_command_line_are_written_as_systemd_reads_them() -> None:
    assert systemd._quoted("/a b/50%/$x") == '"/a b/50%%/$$x"'
    assert systemd._quoted("/plain") == "/plain"


@pytest.mark.parametrize("part", ["trainer", "broker"])
def test_trainer_and_broker_get_units_of_their_own(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    settings = tmp_path / "trainer.toml"
    runs = tmp_path / "runs"
    trackers = f'trackers = ["tensorboard:{runs}", "mlflow:http://127.0.0.1:5000"]'
    settings.write_text(f'job = "home"\n{trackers}\n[tiers.pi]\nbackbone = "x"\n')
    given = [str(settings)] if part == "trainer" else ["--port", "1999", "--host", "0.0.0.0"]
    root = tmp_path / "card"
    assert (
        main([part, "install", *given, "--root", str(root), "--run-as", pwd.getpwuid(os.geteuid()).pw_name])
        == 0
    )
    unit = root / f"etc/systemd/system/sidestream-{part}.service"
    text = unit.read_text()
    state = tmp_path / "state/sidestream" / part / ("home" if part == "trainer" else "")
    expected = {
        "trainer": f"trainer run {settings} --state-dir {state}",
        "broker": f"broker run --host 0.0.0.0 --port 1999 --data-dir {state}",
    }[part]
    assert f"Description=Sidestream {part}\n" in text and expected in text
    assert f'"sidestream {part} uninstall"' in text and f"ReadWritePaths={state}" in text
    assert (
        (f"ReadWritePaths={runs}" in text) == (part == "trainer") == (root / runs.relative_to("/")).is_dir()
    )
    if shutil.which("systemd-analyze"):
        shutil.copy(unit, tmp_path / unit.name)
        done = subprocess.run(
            ["systemd-analyze", "verify", tmp_path / unit.name], capture_output=True, text=True, check=False
        )
        assert unit.name not in done.stderr, done.stderr
    assert main([part, "uninstall", "--root", str(root)]) == 0 and not unit.exists()
    assert "sidestream" in capsys.readouterr().out


def test_a_tracker_whose_folder_depends_on_where_the_trainer_is_started_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "trainer.toml"
    settings.write_text('job = "home"\ntrackers = ["tensorboard:runs"]\n[tiers.pi]\nbackbone = "x"\n')
    assert main(["trainer", "install", str(settings), "--root", str(tmp_path / "card"), "--dry-run"]) == 1
    assert "depends on where it is started" in capsys.readouterr().err
