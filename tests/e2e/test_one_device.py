"""MobiLLM: one device is a fleet of one. It computes each sample once, while the last ones are learnt."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from broker_config.testing.inprocess import InProcessBroker
from sidestream.contract.tensors import Codec
from sidestream.demo.timeline import read_spans, timeline
from tests.e2e.in_process import Kind, accuracies, agent, plan_of, settings, table
from tests.trainer.test_trainer import Listener, trainer
from tests.until import until

MOBILLM = 'method = "mobillm"\n'
KIND = Kind("opt", 4, 32)
SAMPLES, HELD = 48, 90


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker(max_packet_bytes=2_000_000) as running:
        yield running


class Between:
    """Passes everything on to what it stands before."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("passes", [0, 1, 7])
def test_a_sample_is_forwarded_once_however_many_passes_the_trainer_makes(
    broker: InProcessBroker, tmp_path: Path, passes: int
) -> None:
    class Counting(Between):
        texts = 0

        def forward(self, texts: Any, *rest: Any, **options: Any) -> Any:
            Counting.texts += len(texts)
            return self._inner.forward(texts, *rest, **options)

    file = settings(tmp_path, table(tmp_path, "only", KIND), passes=passes, more=MOBILLM)
    with ExitStack() as stack:
        stack.enter_context(trainer(broker, file.load()))
        listener = Listener(broker.transport("watch"))
        stack.enter_context(agent(broker, tmp_path, "only", samples=SAMPLES, backbone=Counting))
        accuracies(listener, {"only": SAMPLES})
        tier = plan_of(listener).tiers["only"]
    assert (tier.sampling, tier.codec) == ("all", Codec.NF4)
    assert Counting.texts == SAMPLES + HELD, "and an evaluation sample once too"


def test_the_forward_of_the_next_batch_overlaps_with_sending_the_last_one_and_with_the_update_on_it(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    """Batch 1 is held back until the forward pass of batch 2 began, and that until batch 1 is learnt."""
    second_began = threading.Event()
    traces = {"trainer": tmp_path / "trainer.jsonl", "device": tmp_path / "device.jsonl"}

    def learnt() -> bool:
        return any(span["name"] == "update" for span in read_spans(traces["trainer"]))

    class Waiting(Between):
        passes = 0

        def forward(self, *arguments: Any, **options: Any) -> Any:
            Waiting.passes += 1
            if Waiting.passes == 2:
                second_began.set()
                until(learnt, "batch 1 is learnt while the forward pass of batch 2 goes on")
            return self._inner.forward(*arguments, **options)

    class HeldBack(Between):
        def publish(self, topic: str, *rest: Any, **more: Any) -> None:
            if topic.endswith("/activations"):
                assert second_began.wait(30)
            self._inner.publish(topic, *rest, **more)

    more = f'{MOBILLM}trace_path = "{traces["trainer"]}"\n'
    file = settings(tmp_path, table(tmp_path, "only", KIND), more=more)
    with ExitStack() as stack:
        stack.enter_context(trainer(broker, file.load()))
        listener = Listener(broker.transport("watch"))
        device = agent(
            *(broker, tmp_path, "only"),
            samples=SAMPLES,
            trace=str(traces["device"]),
            backbone=Waiting,
            transport=HeldBack,
        )
        stack.enter_context(device)
        accuracies(listener, {"only": SAMPLES})
    events = timeline({name: read_spans(path) for name, path in traces.items()})

    def first(name: str, **about: object) -> tuple[int, int]:
        """Start and end on the common axis."""
        found = next(
            one for one in events if one["name"] == name and about.items() <= one.get("args", {}).items()
        )
        return found["ts"], found["ts"] + found["dur"]

    forward, sent = first("forward", batches=[2]), first("publish", batch=1)
    update, awaited = first("update"), first("await receipt", batch=1)
    assert first("forward", batches=[1])[1] <= forward[0], "batch 1 was computed before"
    assert sent[0] <= forward[1] and forward[0] <= sent[1], "it was being sent during the next forward pass"
    assert forward[0] <= update[0] and update[1] <= forward[1], "and learnt during it"
    assert awaited[0] <= forward[1] and forward[0] <= awaited[1]
