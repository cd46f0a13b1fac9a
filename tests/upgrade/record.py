"""Records a session as it goes over the wire, for later versions to be held to.

    python -m tests.upgrade.record tests/upgrade/recordings/NAME.json

Run it at a release, with that release's code, and keep the file for ever. A trainer and two agents on a tiny
random backbone; every message that a subscriber to the whole job hears, in order.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
import threading
from pathlib import Path

from broker_config.connection.connection import Connection
from broker_config.embedded.broker import EmbeddedBroker
from broker_config.settings import BrokerSettings
from broker_config.transport import Event, Received
from tests.e2e.processes import Processes

_SAMPLES = 24


def record(folder: Path) -> list[dict[str, str]]:
    """Run a small job; return its messages."""
    heard: list[dict[str, str]] = []
    lock = threading.Lock()

    def note(event: Event) -> None:
        if isinstance(event, Received):
            payload = base64.b64encode(event.payload).decode()
            with lock:
                heard.append({"topic": event.topic, "payload": payload})

    with EmbeddedBroker(data_dir=folder / "broker") as broker:
        fleet = Processes(folder, broker.url)
        listener = Connection(BrokerSettings(url=broker.url), client_id="recorder")
        listener.subscribe(f"sidestream/v1/{fleet.job}/#")
        listener.start(note)
        assert listener.wait_connected(10)
        try:
            trainer = fleet.trainer("--side-network.width", "32", "--side-network.inner", "32")
            agents = {name: fleet.agent(name, _SAMPLES) for name in ("dev-a", "dev-b")}
            for name, agent in agents.items():
                fleet.expect_exit(agent, name)
            fleet.stop(trainer, "trainer")
        finally:
            listener.close()
            fleet.close()
    return heard


def main(out: str) -> None:
    """Write the recording."""
    with tempfile.TemporaryDirectory() as folder:
        messages = record(Path(folder))
    Path(out).write_text(json.dumps({"messages": messages}, indent=0) + "\n")
    print(f"{len(messages)} messages")


if __name__ == "__main__":
    main(sys.argv[1])
