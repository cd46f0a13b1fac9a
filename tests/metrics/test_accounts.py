"""What became of the samples that were read, as it is told everywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metrics.accounts import account
from sidestream.contract.messages import COUNTERS, Telemetry

A = "a" * 32
PARTS = (
    *("samples_forwarded", "samples_held_out", "samples_broken", "skipped_empty", "skipped_unlabelled"),
    *("skipped_label", "skipped_activations", "unlabelled_dropped"),
)


@given(counts=st.dictionaries(st.sampled_from(PARTS), st.integers(0, 1000)), waiting=st.integers(0, 1000))
def test_all_that_was_read_is_accounted_for(counts: dict[str, int], waiting: int) -> None:
    told = account({**dict.fromkeys(COUNTERS, 0), **counts, "samples_read": sum(counts.values()) + waiting})
    assert told.forwarded + told.held_out + told.waiting + told.unused == told.read
    assert told.waiting == waiting


def test_it_is_said_in_one_sentence_with_every_reason() -> None:
    told = Telemetry(
        stream=A, samples_read=13, samples_forwarded=4, samples_held_out=1, samples_broken=6, skipped_label=2
    )
    assert str(account(told)) == (
        "13 samples read: 4 forwarded, 1 held out, 6 unreadable, 2 with a label that the job does not take"
    )
    assert account(told).reasons == "6 unreadable, 2 with a label that the job does not take"
    assert str(account(Telemetry(stream=A))) == "0 samples read: 0 forwarded, 0 held out"
