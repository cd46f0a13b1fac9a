"""Forward passes overlap with sending: the device computes batch n + 1 while n is on its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from broker_config.testing.inprocess import InProcessBroker
from sidestream.backbone.backbone import Backbone
from sidestream.demo.timeline import read_spans
from tests.agent.fake_trainer import FakeTrainer
from tests.agent.fleet import Running, write_samples


class Waiting:
    """A backbone whose second forward pass ends only after the trainer has the first one's batch."""

    def __init__(self, backbone: Backbone, trainer: FakeTrainer) -> None:
        self._backbone = backbone
        self._trainer = trainer
        self._passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def forward(self, *args: Any, **options: Any) -> Any:
        self._passes += 1
        if self._passes == 2:
            self._trainer.wait(lambda trainer: len(trainer.received) == 1)
        return self._backbone.forward(*args, **options)


def test_the_next_batch_is_computed_while_the_last_one_is_sent_and_awaits_its_receipt(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    """The receipt of batch 1 is held back until batch 2 has come: waiting for either would hang."""
    trainer.publish_plan()
    trainer.receipts = False
    data = {"path": str(write_samples(tmp_path / "data.jsonl", 8))}
    path = tmp_path / "trace.jsonl"
    backbone: Any = Waiting(bert, trainer)
    with Running(broker, backbone, tmp_path, data=data, trace_path=str(path)):
        trainer.wait(lambda t: {batch.sequence for _, batch in t.received} == {1, 2})
        trainer.receipt("pi-1", trainer.received[0][1].stream, 2)
        trainer.publish_weights(3, final=True)
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == 3)
        trainer.wait(lambda t: t.telemetry["pi-1"].outbox_batches == 0)
    spans = read_spans(path)

    def span(name: str, batch: int) -> tuple[int, int]:
        found = [
            (one["ts"], one["ts"] + one["dur"])
            for one in spans
            if one["name"] == name and batch in (one["about"].get("batch"), *one["about"].get("batches", ()))
        ]
        return found[0]

    forward, sent, awaited = span("forward", 2), span("publish", 1), span("await receipt", 1)
    assert sent[0] <= forward[1], "batch 1 was sent before the forward pass of batch 2 was over"
    assert awaited[0] <= forward[1] <= awaited[1], "which was over before the receipt of batch 1 came"
    assert span("forward", 1)[1] <= sent[0] and sent[0] <= awaited[1]
    assert {one["name"] for one in spans} == {"forward", "publish", "await receipt", "adopt", "evaluate"}


def test_without_a_path_nothing_is_written(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    data = {"path": str(write_samples(tmp_path / "data.jsonl", 4))}
    with Running(broker, bert, tmp_path, data=data):
        trainer.wait(lambda t: t.rows() == 4)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "state-pi-1"}
