"""A device with what requirements/agent.txt installs, and so without torch, takes part and predicts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.embedded.broker import EmbeddedBroker
from tests.agent.exported import exported
from tests.e2e.processes import LABELS, ROOT, Processes, until
from tests.e2e.without_torch import absent, installed, lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = ("torch>", "transformers>", "peft>")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Processes]:
    with EmbeddedBroker(data_dir=tmp_path / "broker", kind="amqtt") as broker:
        processes = Processes(tmp_path, broker.url)
        yield processes
        processes.close()


def extras() -> dict[str, list[str]]:
    found: dict[str, list[str]] = PROJECT["optional-dependencies"]
    return found


def test_the_file_is_the_extra() -> None:
    assert lines() == extras()["agent"]


def test_the_extras_together_are_what_the_project_installs_by_itself() -> None:
    """As the same ranges; only what computes exported backbones comes on top."""
    board, torch, trainer = (set(extras()[name]) for name in ("agent", "agent-torch", "trainer"))
    on_top = {"onnxruntime>=1.22,<2", "tokenizers>=0.22,<1"}
    itself = {"sidestream[agent-torch]"}
    assert itself < trainer and board - torch == on_top
    assert board - on_top == {one for one in torch if not one.startswith(TORCH)}
    assert torch | trainer == set(PROJECT["dependencies"]) | itself
    assert extras()["all"] == ["sidestream[agent,export,images,trainer]"]


def test_nothing_of_it_brings_torch_or_what_only_a_trainer_takes() -> None:
    there = installed()
    assert {"onnxruntime", "tokenizers", "numpy", "paho-mqtt"} <= there
    left_out = {"torch", "transformers", "peft", "amqtt", "starlette", "uvicorn", "rich"}
    assert not there & left_out and {"torch", "transformers", "peft", "amqtt", "starlette"} <= absent()


@pytest.mark.parametrize(
    ("command", "lacks"),
    [
        (("top", "--job", "none", "--broker", "mqtt://127.0.0.1:1"), "rich"),
        (("trainer", "verify", "--state-dir", "."), "torch"),
    ],
)
def test_a_command_that_takes_more_says_so_in_a_line(command: tuple[str, ...], lacks: str) -> None:
    run = [sys.executable, "-m", "tests.e2e.without_torch", *command]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines() == [
        f"sidestream: error: {lacks} is not installed here, and this command takes it: pip install sidestream"
    ]


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


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_it_has_three_threads_and_no_library_adds_one(fleet: Processes) -> None:
    folder = exported(fleet.backbone, fleet.folder / "exported", "int8")
    fleet.trainer()
    agent = fleet.start(
        *("light", "agent", "run", "--job", fleet.job, "--device", "light", "--tier", "small"),
        *("--broker", fleet.url, "--state-dir", str(fleet.folder / "light"), "--watch"),
        *("--backbone", str(folder), "--threads", "1", "--data", str(fleet.write_data("light", 40))),
        fresh=True,
    )
    until(lambda: "accuracy" in fleet.log("light"), "weights are adopted and measured")
    threads = Path(f"/proc/{agent.pid}/task")
    until(lambda: len(list(threads.iterdir())) == 3, "those that only start it have gone")
    fleet.stop(agent, "light")
