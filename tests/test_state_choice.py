"""Which state directory a command is about: by the folder, the job, a settings file, or by itself."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from sidestream.contract.errors import ConfigError
from sidestream.service.state_choice import add_state_dir, find_state_dir


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))


def chosen(*words: str, whose: str = "agent") -> Path:
    parser = argparse.ArgumentParser()
    add_state_dir(parser, whose)
    args = parser.parse_args(words)
    find_state_dir(args)
    assert isinstance(args.state_dir, Path)
    return args.state_dir


def test_it_is_given_or_the_jobs_or_the_settings(tmp_path: Path) -> None:
    own = tmp_path / "state" / "sidestream" / "trainer" / "home"
    assert chosen("--state-dir", "x") == Path("x")
    assert chosen("--job", "home", whose="trainer") == own
    settings = tmp_path / "trainer.toml"
    settings.write_text('job = "home"\n')
    assert chosen("--config", str(settings), whose="trainer") == own
    settings.write_text('job = "home"\nstate_dir = "~/there"\n')
    assert chosen("--config", str(settings), whose="trainer") == tmp_path / "there"


def test_without_a_word_it_is_that_of_the_one_job_there_is(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "sidestream" / "agent"
    with pytest.raises(ConfigError, match="by --state-dir, --job or --config; there is none"):
        chosen()
    (folder / "home").mkdir(parents=True)
    assert chosen() == folder / "home"
    (folder / "shop").mkdir()
    with pytest.raises(ConfigError, match="jobs with one here: home, shop"):
        chosen()
    config = tmp_path / ".config" / "sidestream"
    config.mkdir(parents=True)
    (config / "agent.toml").write_text('job = "shop"\n')
    assert chosen() == folder / "shop", "what enrolment wrote decides"


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "names neither a state_dir nor a job"), ("job = 'a/b'", "cannot be part of a topic")],
)
def test_settings_that_do_not_say_are_told(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        chosen("--config", str(tmp_path / "x.toml"))


def test_status_loads_no_torch() -> None:
    modules = "sys, sidestream.cli, side_trainer.operator.status"
    told = f"import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
