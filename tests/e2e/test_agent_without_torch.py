"""A device with what requirements/agent.txt installs, and so without torch, takes part and predicts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.embedded.broker import EmbeddedBroker
from tests.agent.exported import exported
from tests.e2e.processes import LABELS, ROOT, Processes
from tests.e2e.without_torch import absent, installed, lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Processes]:
    with EmbeddedBroker(data_dir=tmp_path / "broker", kind="amqtt") as broker:
        processes = Processes(tmp_path, broker.url)
        yield processes
        processes.close()


def test_the_file_is_the_project_less_torch_with_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = ("torch>", "transformers>", "peft>")
    without = [one for one in project["dependencies"] if not one.startswith(torch)]
    assert lines() == sorted([*without, *project["optional-dependencies"]["agent"]])


def test_nothing_of_it_brings_torch() -> None:
    there = installed()
    assert {"onnxruntime", "tokenizers", "numpy", "paho-mqtt"} <= there
    assert not there & {"torch", "transformers", "peft"} and {"torch", "transformers", "peft"} <= absent()


@pytest.mark.slow
@pytest.mark.embedded
def test_it_takes_part_and_predicts_without_torch(fleet: Processes) -> None:
    folder = exported(fleet.backbone, fleet.folder / "exported", "int8")
    fleet.trainer()
    whole = fleet.agent("whole", 40)  # with torch, so that the two are one tier
    state = fleet.folder / "light"
    light = fleet.start(
        *("light", "agent", "run", "--job", fleet.job, "--device", "light", "--tier", "small"),
        *("--broker", fleet.url, "--state-dir", str(state), "--exit-when-done"),
        *("--backbone", str(folder), "--threads", "1", "--data", str(fleet.write_data("light", 40))),
        module="tests.e2e.without_torch",
        fresh=True,
    )
    fleet.expect_exit(whole, "whole")
    fleet.expect_exit(light, "light")
    assert "modules: []" in fleet.log("light") and "in int8" in fleet.log("light")
    predicted = fleet.start(
        *("predict", "agent", "predict", "--state-dir", str(state), "warm heat"),
        module="tests.e2e.without_torch",
        fresh=True,
    )
    fleet.expect_exit(predicted, "predict")
    said = fleet.log("predict")
    assert "modules: []" in said and said.startswith(LABELS)
    wrong = fleet.start(
        *("wrong", "agent", "predict", "--state-dir", str(state), "--backbone", str(fleet.backbone), "warm"),
        module="tests.e2e.without_torch",
        fresh=True,
    )
    assert wrong.wait(60) == 1
    assert "torch is not installed here, and is wanted" in fleet.log("wrong")
