"""What a device says changes with what the fleet has learnt: broker, trainer and two agents as processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import edge_agent
from broker_config.embedded import EmbeddedBroker
from contract.tasks import Task
from tests.e2e.processes import Processes

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
