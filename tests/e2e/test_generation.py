"""What a device says changes with what the fleet has learnt, and a tier may wait for its decoder."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import edge_agent
from broker_config.embedded.broker import EmbeddedBroker
from broker_config.testing.inprocess import InProcessBroker
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.session.agent import Agent
from side_trainer.settings.reload import SettingsFile
from sidestream.contract.tasks import Task
from tests.agent.tiny_lm import save_tiny_lm
from tests.e2e.in_process import JOB
from tests.e2e.processes import Processes, write_texts
from tests.trainer.test_trainer import Listener, trainer
from tests.until import Clock, until

_TAUGHT = {"dev-a": ("please", "turn the lights off"), "dev-b": ("now", "heat up the bedroom")}


class Taught(Processes):
    """Each device knows one prompt and what follows it."""

    def write_data(self, device: str, samples: int) -> Path:
        prompt, completion = _TAUGHT[device]
        path = self.folder / f"{device}.jsonl"
        path.write_text(json.dumps({"prompt": prompt, "completion": f" {completion}"}) + "\n")
        path.write_text(path.read_text() * samples)
        return path


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Processes]:
    with EmbeddedBroker(data_dir=tmp_path / "broker", kind="amqtt") as broker:
        processes = Taught(tmp_path, broker.url, task=Task.CAUSAL_LM)
        yield processes
        processes.close()


@pytest.mark.embedded
def test_each_device_says_what_either_was_taught_and_not_what_the_decoder_said(fleet: Processes) -> None:
    trainer = fleet.trainer("--learner.passes", "20")
    agents = {name: fleet.agent(name, 30) for name in _TAUGHT}
    for name, agent in agents.items():
        fleet.expect_exit(agent, name)
    fleet.stop(trainer, "trainer")
    for device in _TAUGHT:
        said = edge_agent.load(fleet.folder / device)
        for prompt, completion in _TAUGHT.values():
            assert said.generate(prompt).strip() == completion
            assert not said.generate(prompt, max_tokens=4, frozen=True).strip().startswith(completion)
    state, (prompt, completion) = str(fleet.folder / "dev-a"), _TAUGHT["dev-b"]
    assert fleet.run("agent", "generate", "--state-dir", state, prompt).strip() == completion
    before = fleet.run("agent", "generate", "--state-dir", state, "--frozen", "--max-tokens", "4", prompt)
    assert before.strip() and before.strip() != completion


def test_devices_of_a_tier_wait_until_the_trainer_has_their_decoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    near, there = (
        save_tiny_lm(tmp_path / name, "llama", seed=seed) for name, seed in (("near", 0), ("there", 1))
    )
    path = tmp_path / "trainer.toml"
    path.write_text(
        f'job = "{JOB}"\ntask = "causal-lm"\nstate_dir = "{tmp_path / "trainer"}"\nmetrics_port = -1\n'
        f'page = false\nidle_after_s = 0.2\n[tiers.near]\nbackbone = "{near}"\n'
    )
    file, stop, failures = SettingsFile(path), threading.Event(), list[BaseException]()
    config = AgentConfig(
        job=JOB,
        device="far-1",
        tier="far",
        state_dir=str(tmp_path / "far-1"),
        backbone=str(there),
        exit_when_done=True,
        data=DataConfig(path=str(write_texts(tmp_path / "far.jsonl", 20, seed="far")), held_out_share=0.0),
    )

    def run() -> None:
        try:
            Agent(config, stop=stop, connect=lambda _, name, will: broker.transport(name, will=will)).run()
        except BaseException as exc:
            failures.append(exc)

    agent = threading.Thread(target=run, daemon=True)
    with (
        caplog.at_level(logging.INFO),
        InProcessBroker(max_packet_bytes=2_000_000) as broker,
        trainer(broker, file.load(), file, clock=clock),
    ):
        listener = Listener(broker.transport("watch"))
        path.write_text(path.read_text() + f'[tiers.far]\nbackbone = "{tmp_path / "here"}"\n')
        file.asked.set()
        until(lambda: "tier far waits" in caplog.text, "it is said")
        agent.start()
        until(
            lambda: "backbone" in caplog.text and "loaded in" in caplog.text,
            "the device is ready",
        )
        assert listener.manifest("far") is None and not failures
        shutil.copytree(there, tmp_path / "here")
        clock.until(lambda: not agent.is_alive(), "the tier joins, and the device is done")
        stop.set()
        assert not agent.is_alive() and not failures, failures
    assert edge_agent.load(tmp_path / "far-1", backbone=str(there)).generate("the", max_tokens=3).strip()
