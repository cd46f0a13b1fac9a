"""Byte budgets: by which rung of its ladder a batch is sent, and when the link may be used again.

A device may have two budgets, and the one that allows less decides:

- ``bytes_per_sample`` bounds the mean over the samples sent (:class:`SampleBudget`). The mean comes up to it
  from below: where no rung fits exactly, batches alternate between the one below and the one above.
- ``max_kib_per_minute`` bounds the link (:class:`LinkBudget`). A message that was sent keeps the link busy
  for as long as its bytes take at that rate. Nothing is saved up while the link idles: a bucket that held a
  minute's worth would let two through in one minute. The outbox evens out what the device computes in
  bursts; as it fills, the rung goes down, and as it empties, up.

Knows neither tensors nor network nor outbox. Bytes are those of MQTT payloads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

_RESERVE: Final = 2.0  # batches' worth that may be saved up before a still richer rung is tried
_MOST_SAVED: Final = 32.0  # batches' worth that short samples may leave to long ones
_FIRST_OVERHEAD: Final = 512  # bytes of a message beside its arrays, until one has been measured
_HOLD_S: Final = 30.0  # the outbox is kept this full, measured in time on the link
_LONGEST_S: Final = 300.0  # a message that keeps the link busy for longer is not used to fill it
_CATCH_UP_S: Final = 0.25  # a sender that woke up late may make up for so much
_INTERVAL_MEMORY: Final = 0.8
log = logging.getLogger(__name__)


class Allowance(NamedTuple):
    """Bytes that a budget has for the next batch."""

    earned: float
    """What such a batch earns by itself."""
    saved: float
    """What is left from before; negative where too much was spent."""


def choose(costs: Sequence[float], allowance: Allowance) -> int:
    """The rung that a batch is sent by.

    The first one that its own earnings pay for, or the one above if savings pay for that; once more than a
    few batches' worth is saved, these count as earned. If nothing can be paid for, the cheapest.

    Args:
        costs: Of the batch, by rung, the richest first; infinite where it cannot be sent that way.
        allowance: What there is.
    """
    earned, saved = allowance
    spare = max(0.0, saved - _RESERVE * earned)
    for rung in range(_above(costs, earned + spare), len(costs)):
        if costs[rung] <= earned + saved:
            return rung
    return min(range(len(costs)), key=costs.__getitem__)


def _above(costs: Sequence[float], bytes_: float) -> int:
    """The rung above the first that costs no more than so many bytes."""
    lower = next((rung for rung, cost in enumerate(costs) if cost <= bytes_), len(costs))
    return max(lower - 1, 0)


class SampleBudget:
    """The mean payload of a sample, since the agent joined the job.

    Args:
        bytes_per_sample: What it may be.
    """

    def __init__(self, bytes_per_sample: float) -> None:
        self._bytes_per_sample = bytes_per_sample
        self._saved = 0.0

    def allowance(self, samples: int) -> Allowance:
        """For a batch of so many samples."""
        earned = self._bytes_per_sample * samples
        return Allowance(earned, min(self._saved, _MOST_SAVED * earned))

    def spent(self, payload_bytes: int, samples: int) -> None:
        """A message was made."""
        self._saved += self._bytes_per_sample * samples - payload_bytes


class LinkBudget:
    """What goes up in any minute: at most the budget and one message. Safe between threads.

    Args:
        max_kib_per_minute: The budget.
        clock: Seconds that only rise.
    """

    def __init__(self, max_kib_per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        # With what a late sender makes up for, a minute still holds no more than the budget.
        self._bytes_per_s = max_kib_per_minute * 1024 / (60 + _CATCH_UP_S)
        self._clock = clock
        self._free_s = clock()
        self._asked_s: float | None = None
        self._interval_s = 0.0
        self._lock = threading.Lock()

    def wait_s(self) -> float:
        """Seconds until the next message may be sent."""
        with self._lock:
            return max(0.0, self._free_s - self._clock())

    def spent(self, payload_bytes: int) -> None:
        """Something was published, whatever it was."""
        with self._lock:
            start_s = max(self._free_s, self._clock() - _CATCH_UP_S)
            self._free_s = start_s + payload_bytes / self._bytes_per_s

    def seconds_of(self, payload_bytes: int) -> float:
        """How long so many bytes keep the link busy."""
        return payload_bytes / self._bytes_per_s

    def allowance(self, costs: Sequence[float], backlog_bytes: int) -> Allowance:
        """For a batch of these costs that is made now, while so much waits to be sent."""
        with self._lock:
            now = self._clock()
            if self._asked_s is not None:
                passed_s, known = now - self._asked_s, self._interval_s > 0
                memory = _INTERVAL_MEMORY if known else 0.0
                self._interval_s = memory * self._interval_s + (1 - memory) * passed_s
            self._asked_s = now
            busy = max(0.0, self._free_s - now) * self._bytes_per_s
            earned = self._interval_s * self._bytes_per_s
            # Whatever is next above what the link carries has to find a place before the link idles.
            filling = min(costs[_above(costs, earned)], _LONGEST_S * self._bytes_per_s)
            room = max(_HOLD_S * self._bytes_per_s, filling + 2 * earned) - backlog_bytes - busy
            return Allowance(earned, room - earned)


class Ladder:
    """Chooses a rung for each batch, and learns from what the messages took.

    Args:
        rungs: How many there are; the first is the richest.
        sample: The budget for samples, if there is one.
        link: The budget for the link, if there is one.
        backlog: Bytes that wait to be sent.
    """

    def __init__(
        self,
        rungs: int,
        *,
        sample: SampleBudget | None = None,
        link: LinkBudget | None = None,
        backlog: Callable[[], int] = lambda: 0,
    ) -> None:
        self._rungs = rungs
        self._sample = sample
        self._link = link
        self._backlog = backlog
        self._overhead = _FIRST_OVERHEAD
        self._measured = False
        self._warned = False

    def choose(self, bodies: Sequence[float], samples: int) -> int:
        """The rung for a batch.

        Args:
            bodies: Bytes of its arrays by rung; infinite where they fit no message.
            samples: In it.
        """
        assert len(bodies) == self._rungs
        costs = [body + self._overhead for body in bodies]
        rung = 0
        if self._sample is not None:
            allowance = self._sample.allowance(samples)
            rung = choose(costs, allowance)
            if costs[rung] > sum(allowance) and not self._warned:
                self._warned = True
                log.warning("bytes_per_sample: even the ladder's cheapest rung takes more for some batches")
        if self._link is not None:
            rung = max(rung, choose(costs, self._link.allowance(costs, self._backlog())))
        return rung

    def set_aside(self, body_bytes: float, samples: int) -> None:
        """A batch was kept, to be sent once its labels come."""
        if self._sample is not None:
            self._sample.spent(round(body_bytes) + self._overhead, samples)

    def spent(self, payload_bytes: int, body_bytes: float, samples: int) -> None:
        """A message was made of a batch, or of a part of one, that holds ``body_bytes`` of arrays."""
        overhead = int(payload_bytes - body_bytes)
        self._overhead = max(self._overhead, overhead) if self._measured else overhead
        self._measured = True
        if self._sample is not None:
            self._sample.spent(payload_bytes, samples)
