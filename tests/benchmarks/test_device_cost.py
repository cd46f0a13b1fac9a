"""The device-cost benchmark measures each method's step in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.device_cost import main
from benchmarks.shapes import random_backbone, random_texts
from benchmarks.steps import CUTS, STEPS, layers_on_device


@pytest.mark.parametrize("shape", ["tiny", "tiny-projected"])
@pytest.mark.parametrize("method", STEPS)
def test_every_step_runs(method: str, shape: str) -> None:
    """Also on a backbone like OPT-350M's, whose embeddings are narrower than its layers."""
    backbone = random_backbone(shape, lambda depth: layers_on_device(method, depth))
    step = STEPS[method](backbone, 16)
    step.warm(["w1 w2"])
    traffic = step.run(random_texts(4, 16))
    is_half = method == "split-lora" or method in CUTS
    assert (traffic.up > 0) == (method == "agent" or is_half)
    assert (traffic.down > 0) == is_half
    assert (step.trainable == 0) == (method == "agent")


def test_the_program_prints_and_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    few = ["--shapes", "tiny", "--seq", "16", "--batch", "2", "--steps", "1", "--methods", "agent"]
    assert main([*few, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["results"][0]["method"] == "agent" and found["results"][0]["model_bytes"] > 0
    assert "| tiny" in capsys.readouterr().out
