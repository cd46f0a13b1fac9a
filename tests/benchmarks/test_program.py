"""How the benchmarks' programs take wrong arguments and an interruption: a line, never a traceback."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

import pytest

from benchmarks import accuracy
from benchmarks.program import run_program

Said = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--tiers", "full"], "write NAME:LAYERS"),
        (["--tier-backbone", "full"], "write TIER=BACKBONE"),
        (["--rows", "fleet,best"], "best: no such row"),
    ],
)
def test_a_wrong_argument_is_told_with_what_to_write(capsys: Said, wrong: list[str], told: str) -> None:
    with pytest.raises(SystemExit) as ended:
        accuracy.main(["--train", "a.csv", "--eval", "b.csv", *wrong])
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named_with_its_option(capsys: Said, tmp_path: Path) -> None:
    there = tmp_path / "some.csv"
    there.write_text("text,label\nyes,a\nno,b\n")
    for train, evaluation, option in (
        (tmp_path / "none.csv", there, "--train"),
        (there, "none.csv", "--eval"),
    ):
        assert accuracy.main(["--train", str(train), "--eval", str(evaluation)]) == 1
        assert re.fullmatch(rf"accuracy: {option}: .*none\.csv\n", capsys.readouterr().err)


def test_an_interrupted_program_says_so_and_no_more(capsys: Said) -> None:
    def run(_: argparse.Namespace) -> NoReturn:
        raise KeyboardInterrupt

    assert run_program(argparse.ArgumentParser("some"), run, []) == 130
    assert capsys.readouterr().err == "some: interrupted\n"
