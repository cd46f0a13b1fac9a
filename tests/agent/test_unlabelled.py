"""Whatever comes in whatever order, a sample that got a label is in exactly one batch, with its last one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.batches import coded as kept
from edge_agent.batches.late_labels import LateLabels
from edge_agent.samples.sample import Sample
from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.store.streams import Slot
from edge_agent.store.unlabelled import UnlabelledSample
from sidestream.backbone.sampled import Sampled
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.plan import Plan, SideNetworkSpec, TierPlan
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec, decode, encode
from sidestream.contract.wire import unpack
from tests.agent.fake_trainer import JOB, LABELS, RUN, TIER
from tests.agent.late import give, listed

SAMPLES = 5
PLAN = Plan(
    job=JOB,
    run=RUN,
    revision=1,
    task=Task.TEXT_CLASSIFICATION,
    labels=LABELS,
    tiers={TIER: TierPlan(backbone="m", depth=2, width=4, taps=(1, 2), fingerprint="ab", batch_size=3)},
    side_network=SideNetworkSpec(blocks=2, width=4),
)
KEEP = st.tuples(st.just("keep"), st.integers(0, SAMPLES - 1))
LABEL = st.tuples(st.just("label"), st.tuples(st.integers(0, SAMPLES - 1), st.sampled_from([*LABELS, "dim"])))
ELSE = st.sampled_from([("take up", None), ("crash", None), ("restart", None)])


class Crash(Exception):  # noqa: N818
    """The process ends here."""


def open_outbox(folder: Path, **changes: int) -> Outbox:
    return Outbox(folder, job=JOB, device="pi", tier=TIER, max_bytes=10**6, **changes)  # type: ignore[arg-type]


def late_labels(outbox: Outbox) -> LateLabels:
    return LateLabels(outbox, PLAN, TIER, max_message_bytes=50_000, on_batch=lambda: None)


def keep(outbox: Outbox, number: int, *, held_out: bool = False) -> None:
    """As the producer does with a sample that it has forwarded."""
    key = bytes([number]) * 16
    if outbox.is_consumed(key):
        return
    sampled = Sampled(vectors=np.full((2, 1, 4), number + 1.0, np.float32), lengths=np.array([1]))
    activations = kept.write(sampled, 0, "mean", partial(encode, codec=Codec.F32))
    sample = Sample(f"text {number}", None, key)
    made_by = kept.made_by(PLAN.tiers[TIER], PLAN.task)
    outbox.consume(Consumed(keys=[key], kept=[UnlabelledSample(sample, held_out, made_by, activations)]))


def take_up(outbox: Outbox) -> None:
    labels = late_labels(outbox)
    while labels.take_up():
        pass


@pytest.mark.slow
@given(steps=st.lists(KEEP | LABEL | ELSE, max_size=25))
@settings(max_examples=60)
def test_any_order_of_samples_labels_crashes_and_restarts(steps: list[tuple[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outbox = open_outbox(folder)
        given_last: dict[int, str] = {}
        kept_now: set[int] = set()
        for what, which in steps:
            waiting = {int(one.row.text[5:]) for one in listed(folder) if one.status != "sent"}
            if what == "keep":
                assert isinstance(which, int)
                keep(outbox, which)
                kept_now.add(which)
            elif what == "label":
                assert isinstance(which, tuple)
                if which[0] in waiting:
                    give(folder, {f"text {which[0]}": which[1]})
                    given_last[which[0]] = which[1]
            elif what == "take up":
                take_up(outbox)
            elif what == "crash":
                crash_while_taking_up(outbox)
                outbox = open_outbox(folder)
            else:
                outbox.close()
                outbox = open_outbox(folder)
        take_up(outbox)
        batches = [unpack(ActivationBatch, one.payload) for one in outbox.streams.waiting(0, 100)]
        counters = outbox.counters()
        outbox.close()
        trained = {}
        for batch in batches:
            values = decode(batch.activations)
            for row, target in enumerate(batch.read_targets().tolist()):
                number = int(values[0, row, 0]) - 1
                assert number not in trained
                trained[number] = LABELS[target]
        assert trained == {number: label for number, label in given_last.items() if label in LABELS}
        ids = [one for batch in batches for one in batch.sample_ids.tolist()]
        assert ids == list(range(len(trained))) and counters["samples_forwarded"] == len(trained)
        assert {int(one.row.text[5:]) for one in listed(folder)} == kept_now


def crash_while_taking_up(outbox: Outbox) -> None:
    """The process ends in the middle of the transaction: nothing of it stands."""
    append = outbox.append_all

    def torn(batches: Sequence[tuple[Callable[[Slot], bytes], int]], taken: Consumed) -> list[int]:
        ((pack, samples),) = batches

        def crashing(slot: Slot) -> bytes:
            pack(slot)
            raise Crash

        return append([(crashing, samples)], taken)

    outbox.append_all = torn  # type: ignore[method-assign, assignment]
    with suppress(Crash):
        take_up(outbox)
    outbox.close()


def test_a_label_that_is_corrected_while_its_batch_is_made_counts(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        keep(outbox, 0)
        give(tmp_path, {"text 0": "off"})
        labels, append = late_labels(outbox), outbox.append_all

        def late(batches: Sequence[tuple[Callable[[Slot], bytes], int]], taken: Consumed) -> list[int]:
            outbox.append_all = append  # type: ignore[method-assign]
            give(tmp_path, {"text 0": "on"})
            return append(batches, taken)

        outbox.append_all = late  # type: ignore[method-assign, assignment]
        while labels.take_up():
            pass
        batches = [unpack(ActivationBatch, one.payload) for one in outbox.streams.waiting(0, 9)]
    assert [batch.read_targets().tolist() for batch in batches] == [[LABELS.index("on")]]


def test_what_is_done_with_makes_room_before_anything_that_waits(tmp_path: Path) -> None:
    with open_outbox(tmp_path, unlabelled_max_bytes=1200) as outbox:
        for number in range(3):
            keep(outbox, number)
        give(tmp_path, {"text 2": "on", "text 0": "off"})
        take_up(outbox)
        give(tmp_path, {"text 1": "dim"})
        for number in range(3, 10):
            keep(outbox, number)
        left = [one.row.text for one in listed(tmp_path)]
        dropped = outbox.counters()["unlabelled_dropped"]
    assert "text 0" not in left and "text 2" not in left and left[-1] == "text 9"
    assert dropped == 8 - len(left) > 0


def test_a_sample_with_a_label_is_never_dropped(tmp_path: Path) -> None:
    with open_outbox(tmp_path, unlabelled_max_bytes=1200) as outbox:
        keep(outbox, 0)
        give(tmp_path, {"text 0": "on"})
        for number in range(1, 10):
            keep(outbox, number)
        take_up(outbox)
        assert outbox.size()[0] == 1


def test_ids_are_letters_and_of_the_samples_content(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        for number in range(SAMPLES):
            keep(outbox, number)
        names = [one.id for one in listed(tmp_path)]
    assert len(set(names)) == SAMPLES and all(name.isalpha() and len(name) == 8 for name in names)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_sample_that_is_held_out_is_never_in_a_batch(tmp_path: Path, held_out: bool) -> None:
    with open_outbox(tmp_path) as outbox:
        keep(outbox, 0, held_out=held_out)
        give(tmp_path, {"text 0": "on"})
        take_up(outbox)
        assert outbox.size()[0] == (0 if held_out else 1)
        assert [row.label for row in outbox.held_out(9)] == (["on"] if held_out else [])
