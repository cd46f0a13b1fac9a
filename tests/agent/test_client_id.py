"""Nobody can connect under an agent's client id who has not read its state directory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Event, Received
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import StateError
from sidestream.host.secret_id import FILE_NAME, secret_id
from tests.agent.fake_trainer import FakeTrainer
from tests.agent.fleet import Running, write_samples
from tests.until import until


def test_a_directory_keeps_one_id_that_only_its_owner_may_read(tmp_path: Path) -> None:
    made = secret_id(tmp_path)
    file = tmp_path / FILE_NAME
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)  # as a careless copy would leave it
    assert secret_id(tmp_path) == made and file.stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").mkdir()
    assert secret_id(tmp_path / "other") != made


@pytest.mark.parametrize("content", [b"", b"client", b"\xff" * 32])
def test_what_is_no_id_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    made = secret_id(tmp_path)
    assert len(made) == 32 and secret_id(tmp_path) == made


def test_an_id_that_cannot_be_kept_is_said_so(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(StateError, match="client_id cannot be used"):
        secret_id(tmp_path)


def test_an_agent_comes_back_under_its_id_and_tells_it_nobody(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[bytes] = []

    def listen(event: Event) -> None:
        if isinstance(event, Received):
            seen.append(event.topic.encode() + event.payload)

    watch = broker.transport("watch")
    watch.subscribe("#")
    watch.start(listen)
    data = {"path": str(write_samples(tmp_path / "train.jsonl", 8))}
    trainer.publish_plan()
    ids = []
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with Running(broker, bert, tmp_path, data=data) as agent:
                trainer.wait(lambda t: t.rows() == 8)
                until(lambda: trainer.telemetry["pi-1"].outbox_batches == 0, "it has told of itself")
            ids.append(agent.client_id)
    secret = secret_id(tmp_path / "state-pi-1")
    assert ids[0] == ids[1] and secret in ids[0]
    assert seen and not any(secret.encode() in message for message in seen)
    assert secret not in caplog.text


def test_of_two_agents_of_one_name_one_gives_way_though_neither_lost_its_connection(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = {"path": str(write_samples(tmp_path / "train.jsonl", 8))}
    trainer.publish_plan()
    with (
        Running(broker, bert, tmp_path / "one", data=data) as one,
        Running(broker, bert, tmp_path / "two", data=data) as two,
    ):
        until(lambda: "another agent has this device's name" in caplog.text, "one gives way")
        assert one.client_id != two.client_id
    assert caplog.text.count("another agent has this device's name") == 1
