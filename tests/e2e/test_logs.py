"""No text, no payload: nothing that is in the data or in a message is in any log, however much is logged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.connection.connection import Connection
from broker_config.settings import BrokerSettings
from sidestream.contract.messages import Status, Telemetry
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack
from tests.e2e.processes import LABELS, Processes
from tests.until import until

MARKER = "xyzzymarker"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path, "")
    yield processes
    processes.close()


def marked_data(path: Path) -> None:
    """Samples whose texts hold the marker, and rows that are broken in every way and hold it too."""
    rows = [json.dumps({"text": f"{MARKER} turn it on {n}", "label": LABELS[n % 3]}) for n in range(24)]
    rows += [
        json.dumps({"text": f"{MARKER} of no such label", "label": "nothing"}),
        json.dumps({"label": LABELS[0], "words": MARKER}),
        json.dumps([MARKER]),
        json.dumps({"text": {"deep": MARKER}, "label": LABELS[0]}),
        f'{{"text": "{MARKER}", ',
        f"{MARKER} plain",
    ]
    path.write_text("\n".join(rows) + "\n")


def garbage(real: bytes) -> list[bytes]:
    """Messages that hold the marker and are refused, some of them only once they are decoded."""
    marker = MARKER.encode()
    return [marker, b"\xa6" + marker, real[:-4] + marker, real.replace(b"\xa6online", b"\xab" + marker)]


def test_neither_texts_nor_payloads_are_in_any_log(fleet: Processes, tmp_path: Path) -> None:
    verbose = ("--log-level", "debug", "--log-format", "json")
    broker = fleet.start(
        "broker", "broker", "run", "--port", "0", "--data-dir", str(tmp_path / "b"), *verbose
    )
    until(lambda: "listening" in fleet.log("broker"), "the broker runs")
    fleet.url = "mqtt://" + fleet.log("broker").partition("listening: mqtt://")[2].partition(" ")[0]
    trainer = fleet.trainer(*verbose)
    data = tmp_path / "marked.jsonl"
    marked_data(data)
    topics, stream = Topics(fleet.job), "a" * 32
    vandal = Connection(BrokerSettings(url=fleet.url), client_id="vandal")
    vandal.start(lambda event: None)
    assert vandal.wait_connected(20)
    agent = fleet.agent("dev-a", 1, "--data", str(data), *verbose)
    until(lambda: fleet.journaled() > 0, "batches come in")
    status = pack(Status(state="online", birth=1, stream=stream))
    for payload in garbage(status) + garbage(pack(Telemetry(stream=stream))):
        for topic in (topics.status, topics.telemetry, topics.activations):
            vandal.publish(topic("small", "dev-x"), payload)
        for answer in (
            topics.receipt("small", "dev-a"),
            topics.flow("small"),
            topics.weights("small"),
            topics.plan,
        ):
            vandal.publish(answer, payload)
    assert vandal.flush(20)
    vandal.close()
    fleet.expect_exit(agent, "dev-a")
    fleet.stop(trainer, "trainer")
    fleet.stop(broker, "broker")
    logs = [path for path in tmp_path.rglob("*.log") if path.stat().st_size]
    assert {path.name for path in logs} >= {"broker.log", "trainer.log", "dev-a.log"}
    for path in logs:
        assert MARKER not in path.read_text(errors="replace"), path.name
    for name in ("broker", "trainer", "dev-a"):
        lines = [json.loads(line) for line in (tmp_path / f"{name}.log").read_text().splitlines()]
        assert lines and all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    said = [json.loads(line) for line in (tmp_path / "trainer.log").read_text().splitlines()]
    assert any(line.get("device") == "dev-a" and "is online" in line["message"] for line in said)
    assert any(line.get("reason") == "undecodable" for line in said)
