"""The pipeline as real processes on real brokers: nothing is lost, nothing counts twice, whatever dies."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from broker_config.embedded.broker import EmbeddedBroker, find_mosquitto
from sidestream.contract.tasks import TASKS, Task
from tests.e2e.processes import LABELS, Processes, write_pictures
from tests.until import until

Kind = Literal["amqtt", "mosquitto"]
needs_mosquitto = [
    pytest.mark.mosquitto,
    pytest.mark.skipif(find_mosquitto() is None, reason="there is no mosquitto binary"),
]
AMQTT = pytest.param("amqtt", marks=pytest.mark.embedded)
MOSQUITTO = pytest.param("mosquitto", marks=needs_mosquitto)


@pytest.fixture
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedBroker]:
    kind: Kind = request.param
    with EmbeddedBroker(data_dir=tmp_path / "broker", kind=kind) as running:
        yield running


@pytest.fixture(params=[Task.TEXT_CLASSIFICATION])
def task(request: pytest.FixtureRequest) -> Task:
    """What the job learns; a test says so where it is shown for others too."""
    found: Task = request.param
    return found


of_every_kind = pytest.mark.parametrize(
    "task", [Task.TEXT_CLASSIFICATION, Task.CAUSAL_LM, Task.IMAGE_CLASSIFICATION], indirect=True
)
of_both_kinds = pytest.mark.parametrize("task", [Task.TEXT_CLASSIFICATION, Task.CAUSAL_LM], indirect=True)


@pytest.fixture
def fleet(broker: EmbeddedBroker, task: Task, tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path, broker.url, task=task)
    yield processes
    processes.close()


def assert_nothing_lost_nothing_twice(fleet: Processes, samples: int) -> None:
    state = fleet.state()
    assert state is not None
    assert (state.samples, state.samples_unique, state.samples_trained_unique) == (samples,) * 3
    assert "the digest matches" in fleet.run("trainer", "verify", "--state-dir", str(fleet.trainer_state))


@pytest.mark.parametrize(
    ("broker", "task"),
    [
        pytest.param("amqtt", Task.TEXT_CLASSIFICATION, marks=pytest.mark.embedded),
        pytest.param("mosquitto", Task.TEXT_CLASSIFICATION, marks=needs_mosquitto),
        pytest.param("amqtt", Task.CAUSAL_LM, marks=pytest.mark.embedded),
    ],
    indirect=True,
)
def test_three_agents_learn_and_predict_and_a_late_one_joins_in(fleet: Processes) -> None:
    trainer = fleet.trainer()
    agents = {name: fleet.agent(name, 60) for name in ("dev-a", "dev-b", "dev-c")}
    for name, agent in agents.items():
        fleet.expect_exit(agent, name)
    late = fleet.start(
        *("late", "agent", "run", "--job", fleet.job, "--device", "late", "--tier", "small"),
        *("--broker", fleet.url, "--state-dir", str(fleet.folder / "late"), "--exit-when-done"),
    )
    until(lambda: "adopted weights version" in fleet.log("late"), "the late device has the weights")
    late.kill()
    late.wait()
    answer = fleet.answer(
        "late", "warm heat"
    )  # which may be, of a language model, that the text is at its end
    assert answer in LABELS if TASKS[fleet.task].named else answer == fleet.answer("late", "warm heat")
    fleet.stop(trainer, "trainer")
    assert_nothing_lost_nothing_twice(fleet, 180)


@of_every_kind
@pytest.mark.parametrize("broker", [AMQTT], indirect=True)
def test_a_trainer_killed_three_times_loses_nothing(fleet: Processes) -> None:
    moments = random.Random(11)
    agents = {name: fleet.agent(name, 160) for name in ("dev-a", "dev-b")}
    for _ in range(3):
        before = fleet.journaled()
        trainer = fleet.trainer()
        fleet.await_more_than(before + moments.randrange(40), most=320)
        trainer.kill()
        trainer.wait()
    trainer = fleet.trainer()
    for name, agent in agents.items():
        fleet.expect_exit(agent, name)
    fleet.stop(trainer, "trainer")
    assert_nothing_lost_nothing_twice(fleet, 320)


@of_both_kinds
@pytest.mark.parametrize("broker", [MOSQUITTO], indirect=True)
def test_an_agent_and_the_broker_killed_midway_lose_nothing(fleet: Processes, broker: EmbeddedBroker) -> None:
    trainer = fleet.trainer()
    steady, doomed = fleet.agent("steady", 160), fleet.agent("doomed", 160)
    until(lambda: fleet.journaled() > 20, "batches come in")
    doomed.kill()
    doomed.wait()
    doomed = fleet.agent("doomed", 160)
    until(lambda: fleet.journaled() > 60, "more come in")
    os.kill(broker.pid, signal.SIGKILL)
    until(lambda: not broker.running, "the broker is dead")
    broker.start()
    broker.wait_ready()
    fleet.expect_exit(steady, "steady")
    fleet.expect_exit(doomed, "doomed")
    fleet.stop(trainer, "trainer")
    assert_nothing_lost_nothing_twice(fleet, 320)


@pytest.mark.parametrize(
    ("broker", "task"),
    [pytest.param("amqtt", Task.IMAGE_CLASSIFICATION, marks=pytest.mark.embedded)],
    indirect=True,
)
def test_agents_killed_while_they_read_a_folder_of_images_lose_none_and_send_none_twice(
    fleet: Processes,
) -> None:
    """Broken and half-written files lie among them; one is whole by the next life."""
    trainer = fleet.trainer()
    folder = fleet.write_data("doomed", 90)
    whole = (folder / "cold" / "0000.png").read_bytes()
    (folder / "cold" / "late.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dark" / "broken.jpg").write_bytes(b"no image")
    for most in (10, 40):
        agent = fleet.agent("doomed", 90)
        before = fleet.journaled()
        fleet.await_more_than(before + most, most=90)
        agent.kill()
        agent.wait()
    other = write_pictures(fleet.folder / "other", 1, seed="late") / "cold" / "0000.png"
    (folder / "cold" / "late.png").write_bytes(other.read_bytes())
    fleet.expect_exit(fleet.agent("doomed", 90), "doomed")
    assert "broken.jpg: is no image that can be read here" in (fleet.folder / "doomed.log").read_text()
    fleet.stop(trainer, "trainer")
    assert_nothing_lost_nothing_twice(fleet, 91)


@pytest.mark.parametrize("broker", [AMQTT], indirect=True)
def test_a_tier_added_to_the_settings_file_joins_the_running_job(fleet: Processes) -> None:
    trainer = fleet.trainer()
    steady = fleet.agent("steady", 40)
    until(lambda: fleet.journaled() > 0, "batches come in")
    settings = fleet.folder / "trainer.toml"
    settings.write_text(
        f'{settings.read_text()}[tiers.short]\nbackbone = "{fleet.backbone}"\nlayers = 2\nbatch_size = 4\n'
    )
    trainer.send_signal(signal.SIGHUP)
    short = fleet.agent("short", 40, tier="short")
    fleet.expect_exit(steady, "steady")
    fleet.expect_exit(short, "short")
    fleet.stop(trainer, "trainer")
    state = fleet.state()
    assert state is not None and set(state.tiers) == {"small", "short"}
    assert_nothing_lost_nothing_twice(fleet, 80)
    assert "starting over" not in fleet.log("steady") and "tier short is added" in fleet.log("trainer")
