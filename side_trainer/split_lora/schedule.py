"""Whose batch is served next, where one trainer serves devices one after another. Pure.

The paper's rule (arXiv 2506.02940) is the classical optimum for one machine with delivery times: the longest
tail first, which is what a device still has to do once it is answered. Here a device has several batches to
go, so the tail is what remains to it in all. A device's own time is measured, from the answer to what it
makes of it, as a running mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

Policy = Literal["longest-tail", "fifo", "workload"]
_MEMORY: Final = 0.7


class Arrival(NamedTuple):
    """A batch that may be served."""

    offset: int
    """Its record; the lower, the earlier it came."""
    device: str
    """Whose it is."""
    cut: int
    """Layers that the device holds."""
    remaining: float
    """Batches that the device has to go, this one included; 1 if that is not known."""
    work: float
    """What serving it takes: vectors times layers."""


def order(arrivals: Sequence[Arrival], tails_s: Mapping[str, float], policy: Policy) -> list[Arrival]:
    """Arrivals as they are to be served, the first one first.

    Args:
        arrivals: What has come.
        tails_s: By device, what one batch takes it once it is answered; whose is not known is taken to be
            as slow as the others are on average.
        policy: The rule.
    """
    if policy == "fifo":
        return sorted(arrivals, key=lambda one: one.offset)
    if policy == "workload":
        return sorted(arrivals, key=lambda one: (-one.work, one.offset))
    usual_s = sum(tails_s.values()) / len(tails_s) if tails_s else 1.0
    return sorted(arrivals, key=lambda one: (-one.remaining * tails_s.get(one.device, usual_s), one.offset))


def together(ordered: Sequence[Arrival], most: int) -> list[Arrival]:
    """The first one, and those after it that can share its pass: of the same cut, and of other devices."""
    first = ordered[0]
    chosen, devices = [first], {first.device}
    for one in ordered[1:]:
        if len(chosen) < most and one.cut == first.cut and one.device not in devices:
            chosen.append(one)
            devices.add(one.device)
    return chosen


class Tails:
    """How long devices take from an answer to what they make of it; a running mean each."""

    def __init__(self) -> None:
        self.mean_s: dict[str, float] = {}
        """By device."""
        self._since_s: dict[tuple[str, bytes], float] = {}

    def answered(self, device: str, ticket: bytes, now: float) -> None:
        """A device was answered."""
        self._since_s[device, ticket] = now

    def returned(self, device: str, ticket: bytes, now: float) -> None:
        """It has made something of it."""
        since_s = self._since_s.pop((device, ticket), None)
        if since_s is not None:
            taken_s = now - since_s
            before_s = self.mean_s.get(device, taken_s)
            self.mean_s[device] = _MEMORY * before_s + (1 - _MEMORY) * taken_s
