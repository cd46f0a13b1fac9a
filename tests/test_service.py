"""``sidestream agent install``: a unit that systemd takes, in the right place, and gone again."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edge_agent import service
from edge_agent.service import UNIT, Service
from sidestream.cli import main


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
    text = (root / place / UNIT).read_text()
    assert "MALLOC_ARENA_MAX=1" in text and "Restart=on-failure" in text and str(settings) in text
    assert ("ProtectSystem=strict" in text and "User=" in text) != bool(flags)
    assert main(["agent", "uninstall", "--root", str(root), *flags]) == 0
    assert not (root / place / UNIT).exists() and settings.exists()
    assert main(["agent", "uninstall", "--root", str(root), *flags]) == 1


def test_a_dry_run_shows_the_unit_and_writes_nothing(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    assert main(["agent", "install", str(settings), "--root", str(root), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "[Service]" in shown and "StateDirectory=sidestream-agent" in shown and not root.exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
@pytest.mark.parametrize("for_user", [False, True])
def test_systemd_finds_nothing_wrong_with_it(settings: Path, tmp_path: Path, for_user: bool) -> None:
    unit = tmp_path / UNIT
    unit.write_text(Service(settings=settings, for_user=for_user).text())
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
    said = [line for line in (done.stdout + done.stderr).splitlines() if UNIT in line]
    assert not said and (done.returncode == 0 or not said), done.stderr


def test_a_wrong_option_would_be_found(settings: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    unit = tmp_path / UNIT
    text = Service(settings=settings, for_user=False).text()
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
    assert service._quoted("/a b/50%/$x") == '"/a b/50%%/$$x"'
    assert service._quoted("/plain") == "/plain"
