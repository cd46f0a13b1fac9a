"""Nobody can tell the trainer's client id from what it publishes, so nobody can take its session over."""

from __future__ import annotations

import threading
import urllib.request
from pathlib import Path

import pytest

from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Transport, Will
from side_trainer.settings.schema import TrainerConfig
from side_trainer.trainer import run_trainer
from sidestream.contract.messages import TrainerStatus
from sidestream.contract.topics import Topics
from sidestream.contract.wire import unpack
from tests.trainer.conftest import config, devices
from tests.trainer.test_trainer import Listener, born

STATUS = Topics("colours").trainer_status


@pytest.mark.parametrize("lives", [1, 2])
def test_nothing_that_the_trainer_says_holds_any_part_of_its_client_id(
    broker: InProcessBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture, lives: int
) -> None:
    ids = [life(broker, config(tmp_path, metrics_port=0, page=True, page_port=0)) for _ in range(lives)]
    assert len(set(ids)) == lives
    assert not any(one.rpartition("-")[2][:8] in caplog.text for one in ids)


def life(broker: InProcessBroker, settings: TrainerConfig) -> str:
    """Run a trainer for a while; return its client id, having looked for it in all that it said."""
    ids: list[str] = []
    urls: list[str] = []
    stop, ready = threading.Event(), threading.Event()

    def connect(_: TrainerConfig, client_id: str, will: Will) -> Transport:
        ids.append(client_id)
        return broker.transport(client_id, will=will)

    def started(*given: str) -> None:
        urls.extend(given)
        ready.set()

    thread = threading.Thread(
        target=lambda: run_trainer(settings, stop, connect=connect, started=started), daemon=True
    )
    thread.start()
    assert ready.wait(60)
    listener = Listener(broker.transport("watch"))
    born(listener, devices()[:1])
    status = unpack(TrainerStatus, broker.retained[STATUS])
    pages = [urllib.request.urlopen(url, timeout=10).read().decode() for url in urls]
    listener.transport.close()
    stop.set()
    thread.join(60)
    secret = ids[0].rpartition("-")[2]
    assert len(secret) >= 32 and status.instance[:8] not in secret and status.run[:8] not in secret
    said = [event.topic.encode() + event.payload for event in listener.seen]
    assert said and not any(secret[:8].encode() in one for one in said)
    assert not any(secret[:8] in page for page in pages)
    return ids[0]
