"""A shell completes commands and options by a script that holds all words; without a word there is help."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sidestream.cli import build_parser, main
from sidestream.completion import script


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["trai"], ["trainer"]),
        (["agent", "ru"], ["run"]),
        (["agent", "run", "--log-lev"], ["--log-level"]),
        (["agent", "run", "--log-level", ""], ["debug", "info", "warning", "error"]),
        (["trainer", "quarantine", "re"], ["release"]),
        (["trainer", "status", "--j"], ["--job", "--json"]),
    ],
)
def test_bash_completes(tmp_path: Path, words: list[str], offers: list[str]) -> None:
    (tmp_path / "script").write_text(script(build_parser(), "bash"))
    typed = " ".join(repr(word) for word in ["sidestream", *words])
    told = f"source {tmp_path}/script; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _sidestream; "
    done = subprocess.run(
        ["bash", "-c", told + 'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == sorted(offers)


def test_fish_and_zsh_get_scripts_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef sidestream\n")
    assert main(["completion", "fish"]) == 0
    out = capsys.readouterr().out
    assert "complete -c sidestream -n '__fish_use_subcommand' -f -a trainer\n" in out
    assert "-l log-level -x -a 'debug info warning error'" in out


@pytest.mark.parametrize("words", [[], ["agent"], ["trainer", "quarantine"]])
def test_without_a_command_there_is_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as left:
        code = int(left.code or 0)
    said = capsys.readouterr()
    assert (code, "usage: sidestream" in said.out) == (0, True) or "see sidestream" in said.err
    assert words or code == 0
