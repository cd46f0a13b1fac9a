from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from contract.messages import ActivationBatch
from contract.wire import unpack
from edge_agent.backbone import Backbone
from edge_agent.outbox import Outbox
from edge_agent.samples import Row, is_held_out
from tests.agent.fake_trainer import JOB, TIER
from tests.agent.fleet import sentence, write_samples

SAMPLES = 300
ROOT = Path(__file__).parents[2]


def live(state: Path, data: Path, reference: str, *, for_s: float | None) -> None:
    """One life of a producer; killed after ``for_s``, or left to finish."""
    command = [sys.executable, "-m", "tests.agent.agent_process", str(state), str(data), reference]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        if for_s is None:
            assert process.wait(60) == 0
        else:
            time.sleep(for_s)
            process.kill()


def test_killed_at_random_moments_every_sample_is_in_exactly_one_batch(
    tmp_path: Path, bert: Backbone
) -> None:
    data = write_samples(tmp_path / "train.jsonl", SAMPLES)
    state, moments = tmp_path / "state", random.Random(1)
    for _ in range(2):
        live(state, data, bert.name, for_s=moments.uniform(0.0, 0.25))
    live(state, data, bert.name, for_s=None)
    held = sum(is_held_out(Row(sentence(number), None), 0.2) for number in range(SAMPLES))
    with Outbox(state, job=JOB, device="pi", tier=TIER, max_bytes=1) as outbox:
        waiting = outbox.pending(0, 10_000)
        counters = outbox.counters()
        assert len(outbox.held_out(SAMPLES)) == held
    batches = [unpack(ActivationBatch, batch.payload) for batch in waiting]
    assert [batch.sequence for batch in batches] == list(range(1, len(batches) + 1))
    assert len({batch.stream for batch in batches}) == 1
    ids = [sample for batch in batches for sample in batch.sample_ids.tolist()]
    assert ids == list(range(SAMPLES - held))
    assert counters["samples_forwarded"] == SAMPLES - held
    assert counters["samples_held_out"] == held and counters["samples_read"] == SAMPLES
