"""A device in a language-model job forwards, sends and measures each token once, in texts of any length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from edge_agent.batches.patience import Patience
from edge_agent.batches.producer import Producer
from edge_agent.batches.rungs import Rungs
from edge_agent.batches.side_tasks import SideTasks
from edge_agent.batches.token_maker import TokenMaker, cut_rows
from edge_agent.config import DataConfig
from edge_agent.samples.sample import Row, Sample
from edge_agent.samples.source import NamesIn, SampleSource
from edge_agent.samples.sources import open_source
from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.weights.token_evaluation import TokenEvaluation
from metrics.catalogue import AgentMetrics
from side_trainer.receive.inbox import examine
from sidestream.backbone.sampled import Sampled
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.plan import Plan, SideNetworkSpec, TierPlan
from sidestream.contract.sampling import TOKEN_LADDER
from sidestream.contract.tasks import NO_TARGET, TargetForm, Task
from sidestream.contract.tensors import Codec, decode
from sidestream.contract.wire import unpack
from sidestream.host.trace import Trace
from sidestream.side_network.network import SideNetwork
from tests.agent.tiny import LAYERS, WIDTH, WORDS
from tests.agent.tiny_lm import save_tiny_lm
from tests.outboxes import message
from tests.vectors import answering

pytestmark = pytest.mark.slow

LONG = " ".join(WORDS[(7 * i) % len(WORDS)] for i in range(150))
MESSAGE_BYTES = 1024 + 600
"""Room for a few vectors, so that rows have to be cut."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchLanguageModel:
    return TorchLanguageModel.load(str(save_tiny_lm(tmp_path_factory.mktemp("lm"), "gpt2")))


def plan_for(model: TorchLanguageModel, **tier: Any) -> Plan:
    return Plan(
        job="assistant",
        run="0" * 32,
        revision=1,
        task=Task.CAUSAL_LM,
        labels=(),
        tiers={
            "pi": TierPlan(
                backbone="m",
                **{"sampling": "all", "codec": Codec.INT8, "batch_size": 4, "max_tokens": 20, **tier},
                depth=LAYERS,
                width=WIDTH,
                taps=(1, LAYERS),
                fingerprint=model.fingerprint,
                head=model.head_fingerprint,
                vocabulary=model.head.vocabulary,
            )
        },
        side_network=SideNetworkSpec(blocks=2, width=8),
    )


@dataclass
class Work:
    """A device's producer on its own."""

    folder: Path
    model: TorchLanguageModel
    plan: Plan

    def run(
        self,
        data: Path | SampleSource,
        *,
        stop_after: int = 10**9,
        message_bytes: int = MESSAGE_BYTES,
        held_out_share: float = 0.0,
        **more: Any,
    ) -> None:
        made = [0]

        def count() -> None:
            made[0] += 1

        with self.outbox() as outbox:
            Producer(
                open_source(DataConfig(path=str(data))) if isinstance(data, Path) else data,
                outbox,
                Rungs(self.model, self.plan, "pi", message_bytes, **more),
                held_out_share=held_out_share,
                poll_s=0.05,
                patience=Patience("computing waits", lambda: made[0] >= stop_after, SideTasks()),
                on_batch=count,
                metrics=AgentMetrics(CollectorRegistry()),
                trace=Trace(),
            ).run()

    def outbox(self) -> Outbox:
        return Outbox(self.folder, job="assistant", device="d", tier="pi", max_bytes=10**8)

    def sent(self) -> list[ActivationBatch]:
        with self.outbox() as outbox:
            payloads = [one.payload for one in outbox.streams.waiting(0, 10**6)]
        batches = [unpack(ActivationBatch, payload) for payload in payloads]
        assert [examine(payload, "pi", self.plan).batch for payload in payloads] == batches
        return batches


def write(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told(batches: list[ActivationBatch]) -> list[int]:
    return sorted(int(token) for batch in batches for token in batch.read_targets())


def test_every_token_of_long_and_short_texts_is_sent_once_in_messages_that_fit(
    model: TorchLanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [LONG, "turn the lights on", "off now", LONG + " end"]
    work = Work(tmp_path, model, plan_for(model))
    work.run(write(tmp_path / "x.jsonl", *({"text": text} for text in texts)))
    batches = work.sent()
    assert told(batches) == sorted(token for text in texts for token in model.tokens(text)[1:])
    assert {batch.target_form for batch in batches} == {TargetForm.TOKENS}
    with work.outbox() as outbox:
        assert max(len(one.payload) for one in outbox.streams.waiting(0, 10**6)) <= MESSAGE_BYTES
        samples = [int(one) for batch in batches for one in batch.sample_ids]
        assert samples == list(range(len(samples))) and outbox.counters()["samples_forwarded"] == len(samples)
    assert max(int(batch.row_lengths.max()) for batch in batches) < 20  # the windows were cut
    assert not caplog.records, "a text is all that there is to say; no label is missed"


def test_vectors_are_the_taps_before_their_targets(model: TorchLanguageModel, tmp_path: Path) -> None:
    work = Work(tmp_path, model, plan_for(model, codec=Codec.F32))
    work.run(write(tmp_path / "x.jsonl", {"text": "turn the kitchen light off"}), message_bytes=10**6)
    (batch,) = work.sent()
    ids = model.tokens("turn the kitchen light off")
    assert batch.read_targets().tolist() == ids[1:]
    losses, _ = model.head.judge(
        torch.from_numpy(decode(batch.activations)[-1]), torch.tensor(batch.read_targets().astype(np.int64))
    )
    logits = model.head(torch.from_numpy(decode(batch.activations)[-1]))
    assert torch.allclose(losses, -logits.log_softmax(1)[range(len(ids) - 1), ids[1:]], atol=1e-4)


def test_only_completions_are_predicted_and_their_text_is_told_to_nobody(
    model: TorchLanguageModel, tmp_path: Path
) -> None:
    work = Work(tmp_path, model, plan_for(model))
    path = write(
        tmp_path / "x.jsonl",
        {"prompt": "turn the lights", "completion": " on please"},
        {"prompt": "turn", "completion": ""},
        {"text": "heat up"},
    )
    work.run(path)
    ends = [*model.tokens("on please"), 2]
    assert told(work.sent()) == sorted([*ends, *model.tokens("up")])
    assert open_source(DataConfig(path=str(path))).labels(lambda label: (label,)) == ()
    with work.outbox() as outbox:
        assert outbox.counters()["samples_skipped"] == 1


@pytest.mark.slow
def test_stopped_and_started_at_any_moment_each_token_is_sent_once(
    model: TorchLanguageModel, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", *({"text": f"{word} {LONG}"} for word in WORDS[:4]))
    whole = Work(tmp_path / "whole", model, plan_for(model))
    whole.folder.mkdir()
    whole.run(path)
    parts = Work(tmp_path / "parts", model, plan_for(model))
    parts.folder.mkdir()
    for _ in range(40):
        parts.run(path, stop_after=1)
    assert told(parts.sent()) == told(whole.sent())
    samples = [int(one) for batch in parts.sent() for one in batch.sample_ids]
    assert samples == list(range(len(samples)))


class ReadTwice(SampleSource):
    """As of a file that was replaced by an equal one at once."""

    ended = False

    def __init__(self, path: Path) -> None:
        self._path = path

    def labels(self, names_in: NamesIn) -> tuple[str, ...]:
        return ()

    def read(self) -> Iterator[Sample]:
        for _ in range(2):
            yield from open_source(DataConfig(path=str(self._path))).read()
        self.ended = True


def test_a_long_text_that_is_read_again_before_it_is_computed_is_sent_once(
    model: TorchLanguageModel, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", {"text": LONG})
    work = Work(tmp_path, model, plan_for(model, batch_size=64))
    work.run(ReadTwice(path))
    assert told(work.sent()) == sorted(model.tokens(LONG)[1:])


def test_a_crash_within_a_long_row_leaves_all_of_it_or_nothing(tmp_path: Path) -> None:
    def fails(slot: Any) -> bytes:
        raise RuntimeError("killed")

    with Outbox(tmp_path, job="a", device="d", tier="pi", max_bytes=10**6) as outbox:
        parts: list[Any] = [(partial(message, rows=2), 2), (fails, 1)]
        with pytest.raises(RuntimeError):
            outbox.append_all(parts, Consumed(keys=[b"k"]))
        assert outbox.size() == (0, 0) and not outbox.is_consumed(b"k")
        parts[1] = (message, 1)
        assert outbox.append_all(parts, Consumed(keys=[b"k"])) == [1, 2] and outbox.is_consumed(b"k")
        batches = [unpack(ActivationBatch, one.payload) for one in outbox.streams.waiting(0, 9)]
        assert [batch.sample_ids.tolist() for batch in batches] == [[0, 1], [2]]


@pytest.mark.parametrize(("sampling", "share"), [("random:0.5", 0.5), ("hardest:0.25", 0.25)])
def test_a_share_of_the_tokens_is_what_travels(
    model: TorchLanguageModel, tmp_path: Path, sampling: str, share: float
) -> None:
    work = Work(tmp_path, model, plan_for(model, sampling=sampling))
    work.run(write(tmp_path / "x.jsonl", {"text": LONG}))
    assert len(told(work.sent())) == pytest.approx(149 * share, abs=5)


@pytest.mark.slow
def test_a_byte_budget_sends_only_some_of_the_tokens(model: TorchLanguageModel, tmp_path: Path) -> None:
    texts = [f"{LONG} {word}" for word in WORDS]
    path = write(tmp_path / "x.jsonl", *({"text": text} for text in texts))
    budget = 700  # bytes a window of 20 tokens; all of them in int4 take more
    work = Work(tmp_path, model, plan_for(model))
    work.run(path, message_bytes=10**6, bytes_per_sample=budget)
    batches = work.sent()
    assert {batch.sampling for batch in batches} & {rung.sampling for rung in TOKEN_LADDER[2:]}
    with work.outbox() as outbox:
        total = sum(len(one.payload) for one in outbox.streams.waiting(0, 10**6))
    assert total / sum(len(batch.sample_ids) for batch in batches) <= budget


def test_held_out_texts_are_measured_here_and_never_sent(model: TorchLanguageModel, tmp_path: Path) -> None:
    rows = [{"text": f"{LONG} {word} {word}"} for word in WORDS]
    work = Work(tmp_path, model, plan_for(model))
    work.run(write(tmp_path / "x.jsonl", *rows), held_out_share=0.4)
    with work.outbox() as outbox:
        held = outbox.held_out(100)
    assert 0 < len(held) < len(rows)
    sent = [row["text"] for row in rows if row["text"] not in {one.text for one in held}]
    assert told(work.sent()) == sorted(token for text in sent for token in model.tokens(text)[1:])


def test_perplexity_and_accuracy_are_those_of_the_model_on_its_own(model: TorchLanguageModel) -> None:
    rows = [Row(LONG, None), Row(("turn the lights", " on please"), None), Row("off", None)]
    network = SideNetwork(SideNetworkSpec(blocks=2, width=8), labels=0, seed=1, task=Task.CAUSAL_LM)
    network.add_align("default", WIDTH)
    maker = TokenMaker(model, plan_for(model), "pi", 10**6)

    def score(most: int) -> Any:
        return TokenEvaluation(maker, lambda: rows, most, stopped=lambda: False).measure(
            answering(network, Task.CAUSAL_LM), "default"
        )

    losses, hits = [], []
    for row in rows[:2]:
        for window in maker.windows(row):
            sampled = maker.every([window])
            real = [target for target in window.targets if target != NO_TARGET]
            each, right = model.judge(sampled.vectors[-1], np.array(real))
            losses += each.tolist()
            hits += right.tolist()
    found = score(10**6)
    assert found.tally.units == len(losses) == 149 + 3 and found.samples == 2
    assert found.measures["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)
    assert found.measures["accuracy"] == pytest.approx(np.mean(hits), abs=0.01)
    assert score(50).tally.units == 50


def test_rows_are_cut_into_nearly_equal_parts_and_nothing_is_lost() -> None:
    targets = np.arange(13)
    vectors = np.broadcast_to(targets[:, None], (2, 13, 4)).astype(np.float32)
    whole = Sampled(vectors=vectors, lengths=np.array([7, 2, 4]), targets=targets)
    cut = cut_rows(whole, 3)
    assert cut.owners is not None and cut.owners.tolist() == [0, 0, 0, 1, 2, 2]
    assert cut.lengths.tolist() == [2, 2, 3, 2, 2, 2]
    assert cut.targets is whole.targets and cut.vectors is whole.vectors
    assert cut_rows(whole, 7).lengths.tolist() == [7, 2, 4]
