"""Where the samples went that devices read, in one sum and the same words wherever it is shown. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from sidestream.contract.messages import COUNTERS, Telemetry

_LEFT_OUT: Final = {
    "samples_broken": "unreadable",
    "skipped_empty": "without a text",
    "skipped_unlabelled": "without a label",
    "skipped_label": "with a label that the job does not take",
    "skipped_activations": "with activations that cannot be sent",
    "unlabelled_dropped": "dropped while they waited for a label",
}
"""By counter of Telemetry, what became of a sample that was read and is of no use."""


class Account(NamedTuple):
    """Samples by what became of them; they add up to those read."""

    read: int
    """Samples taken from the source, rows that could not be read among them."""
    forwarded: int
    """Of those, passed through the backbone for training."""
    held_out: int
    """Kept for local evaluation."""
    waiting: int
    """Without a label so far, or with one that has just come."""
    left_out: tuple[tuple[int, str], ...]
    """What is not used, by reason."""

    @property
    def unused(self) -> int:
        """How many samples are not used."""
        return sum(count for count, _ in self.left_out)

    @property
    def reasons(self) -> str:
        """Why samples are not used; empty if all are."""
        return ", ".join(f"{count} {why}" for count, why in self.left_out)

    def __str__(self) -> str:
        told = [f"{self.forwarded} forwarded", f"{self.held_out} held out"]
        told += [f"{self.waiting} wait for a label"] if self.waiting else []
        return f"{self.read} samples read: {', '.join([*told, *filter(None, [self.reasons])])}"


def account(told: Telemetry | Mapping[str, float]) -> Account:
    """The account of a device, or of many by their counters' sums."""
    counts: Mapping[str, Any] = msgspec.structs.asdict(told) if isinstance(told, Telemetry) else told
    read, forwarded, held_out = (
        int(counts[name]) for name in ("samples_read", "samples_forwarded", "samples_held_out")
    )
    left_out = tuple((int(counts[name]), why) for name, why in _LEFT_OUT.items() if counts[name])
    used = forwarded + held_out + sum(count for count, _ in left_out)
    return Account(read, forwarded, held_out, max(0, read - used), left_out)


if not {*_LEFT_OUT} <= {*COUNTERS}:  # pragma: no cover
    raise AssertionError("what is left out is counted by Telemetry")
