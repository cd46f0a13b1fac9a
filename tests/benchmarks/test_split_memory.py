"""The benchmark of split LoRA's memory measures each form in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.split_memory import main
from benchmarks.split_server import FORMS, ServerRequest


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_trainer_learns(form: str) -> None:
    server = FORMS[form](ServerRequest(form=form, shape="tiny", cuts=[1, 3], batch=2, tokens=5))
    server.learn()
    server.learn()


@pytest.mark.slow
def test_the_program_prints_and_writes_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    few = ["--shapes", "tiny", "--seq", "8", "--batch", "2", "--steps", "1"]
    assert (
        main([*few, "--trainer-shape", "tiny", "--trainer-seq", "8", "--cuts", "1", "2", "--json", str(out)])
        == 0
    )
    found = json.loads(out.read_text())
    assert [entry["form"] for entry in found["devices"]] == ["lora-plain", "cut-1", "cut-2", "cut-3"]
    assert found["devices"][0]["peak_of_lora"] <= 1 and found["devices"][0]["cpu_of_lora"] == 1
    assert found["trainer"]["submodels"]["peak"] > 0 and found["commit"]
    printed = capsys.readouterr().out
    assert "| tiny" in printed and "less than submodels" in printed
