from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.commands.samples import _unlabelled_store
from edge_agent.samples.sample import Row, is_held_out
from edge_agent.store.outbox import Outbox
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import DataError
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.wire import unpack
from tests.agent.fake_trainer import JOB, LABELS, TIER
from tests.agent.fleet import sentence, write_samples
from tests.agent.late import listed, write_unlabelled
from tests.forked import Forked
from tests.until import until

SAMPLES = 300
LATE = 120
ROOT = Path(__file__).parents[2]


def written(state: Path) -> int:
    """Bytes of the outbox's files."""
    return sum(path.stat().st_size for path in state.glob("agent.db*"))


def live(
    state: Path,
    data: Path,
    reference: str,
    *,
    kib: int | None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """One life of a producer; killed once it has written so much to its outbox, or left to finish."""
    out = state.parent / "said"
    out.unlink(missing_ok=True)
    process = Forked("tests.agent.agent_process", str(state), str(data), reference, out=out, cwd=ROOT)
    until(lambda: out.read_text() or process.returncode is not None, "it is ready")
    if kib is None:
        assert process.wait(120) == 0, out.read_text()
    else:
        meanwhile()
        most = written(state) + 1024 * kib
        until(lambda: written(state) > most or process.poll() is not None, "it goes on")
        process.kill()
        process.wait()


@pytest.mark.slow
def test_killed_at_random_moments_every_sample_is_in_exactly_one_batch(
    tmp_path: Path, bert: Backbone
) -> None:
    data = write_samples(tmp_path / "train.jsonl", SAMPLES)
    state, moments = tmp_path / "state", random.Random(1)
    for _ in range(2):
        live(state, data, bert.name, kib=moments.randrange(600))
    live(state, data, bert.name, kib=None)
    held = sum(is_held_out(Row(sentence(number), None), 0.2) for number in range(SAMPLES))
    with Outbox(state, job=JOB, device="pi", tier=TIER, max_bytes=1) as outbox:
        waiting = outbox.streams.waiting(0, 10_000)
        counters = outbox.counters()
        assert len(outbox.held_out(SAMPLES)) == held
    batches = [unpack(ActivationBatch, batch.payload) for batch in waiting]
    assert [batch.sequence for batch in batches] == list(range(1, len(batches) + 1))
    assert len({batch.stream for batch in batches}) == 1
    ids = [sample for batch in batches for sample in batch.sample_ids.tolist()]
    assert ids == list(range(SAMPLES - held))
    assert counters["samples_forwarded"] == SAMPLES - held
    assert counters["samples_held_out"] == held and counters["samples_read"] == SAMPLES


@pytest.mark.slow
def test_killed_at_random_moments_every_label_that_came_late_is_trained_exactly_once(
    tmp_path: Path, bert: Backbone
) -> None:
    """Labels come between lives and beside them; some are corrected, some samples never get one."""
    data = write_unlabelled(tmp_path / "train.jsonl", LATE)
    state, moments = tmp_path / "state", random.Random(2)
    live(state, data, bert.name, kib=400)
    labels: dict[str, str] = {}

    def label() -> None:
        waiting = [one for one in listed(state) if one.status in ("waiting", "labelled")]
        for one in moments.sample(waiting, len(waiting) // 2):
            labels[one.row.text] = moments.choice(LABELS)
            give_one(state, one.id, labels, one.row.text)

    label()
    live(state, data, bert.name, kib=moments.randrange(400), meanwhile=label)
    label()
    live(state, data, bert.name, kib=None)
    with Outbox(state, job=JOB, device="pi", tier=TIER, max_bytes=1) as outbox:
        batches = [unpack(ActivationBatch, one.payload) for one in outbox.streams.waiting(0, 10_000)]
        counters = outbox.counters()
    found = listed(state)
    assert len(found) == LATE == counters["samples_read"] == counters["samples_unlabelled"]
    assert {one.row.text for one in found} == {sentence(number) for number in range(LATE)}
    done = {one.row.text: one.row.label for one in found if one.status in ("sent", "evaluation")}
    assert done == labels and 0 < len(done) < LATE
    sent = [one for one in found if one.status == "sent"]
    ids = [sample for batch in batches for sample in batch.sample_ids.tolist()]
    assert ids == list(range(len(sent))) and counters["samples_forwarded"] == len(sent)
    on = sum(one.row.label == "on" for one in sent)
    assert sum(int(batch.read_targets().sum()) for batch in batches) == on


def give_one(state: Path, name: str, labels: dict[str, str], text: str) -> None:
    """Give a label as the command line does; one that comes too late is taken back."""
    try:
        with _unlabelled_store(state, writes=True) as store:
            store.text_of(name)
            store.label(name, labels[text])
    except DataError:
        labels[text] = next(one.row.label or "" for one in listed(state) if one.id == name)
