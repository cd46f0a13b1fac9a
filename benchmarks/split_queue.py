"""One trainer and several devices as a discrete-event simulation: what an order of service is worth. Pure.

The fleet is the paper's as far as it is known: BERT-base, batches of 16 × 128 tokens, six devices of .47 to
3.53 TFLOPS, of which 0.35 is reached, links of 20 to 200 Mbit/s, activations in int8.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from side_trainer.split_lora.schedule import Arrival, Policy, Tails, order

_WIDTH, _INNER, _LAYERS = 768, 3072, 12
_ROWS, _TOKENS = 16, 128
_REACHED: Final = 0.35
_TFLOPS: Final = (0.47, 1.33, 1.69, 2.15, 2.77, 3.53)


class Device(NamedTuple):
    """How long things take it, in seconds."""

    cut: int
    forward_s: float
    backward_s: float
    """With the forward pass before it."""
    link_s: float
    """One way, for a batch's activations or their gradient."""
    latency_s: float = 0.0
    """One way, for what is small."""

    @property
    def tail_s(self) -> float:
        """From an answer to the end."""
        return self.link_s + self.backward_s


def flops(layers: int) -> float:
    """Of a forward pass."""
    matrices = 2 * layers * (4 * _WIDTH**2 + 2 * _WIDTH * _INNER) * _ROWS * _TOKENS
    return matrices + layers * 4 * _ROWS * _TOKENS**2 * _WIDTH


def devices(lots: random.Random, cuts: Sequence[int], count: int = 6) -> list[Device]:
    """A fleet; the links are drawn."""
    found = []
    for number in range(count):
        cut, speed = cuts[number % len(cuts)], _TFLOPS[number % len(_TFLOPS)] * _REACHED * 1e12
        rate = lots.uniform(20, 200) * 1e6 / 8
        latency_s = lots.uniform(0.005, 0.06) / 2
        link_s = latency_s + _ROWS * _TOKENS * (_WIDTH + 2) / rate
        found.append(Device(cut, flops(cut) / speed, 3 * flops(cut) / speed, link_s, latency_s))
    return found


def serving_s(cut: int, tflops: float) -> float:
    """How long a trainer of such a speed takes for a batch of a device with so many layers."""
    return 3 * flops(_LAYERS - cut) / (tflops * _REACHED * 1e12)


class Simulation:
    """One round: every device has so many batches answered, and makes something of each.

    Args:
        fleet: The devices.
        tflops: Of the trainer.
        policy: Of the order of service.
        batches: Of each device.
        window: That a device may have unanswered.
        tails: What is known of the devices, and learns; shared by rounds.
    """

    def __init__(
        self, fleet: Sequence[Device], tflops: float, policy: Policy, batches: int, window: int, tails: Tails
    ) -> None:
        self._fleet = fleet
        self._tflops = tflops
        self._policy: Policy = policy
        self._batches = batches
        self._window = window
        self._tails = tails
        self._events: list[tuple[float, int, str, int]] = []
        self._count = itertools.count()
        self._sent: dict[int, int] = defaultdict(int)
        self._served: dict[int, int] = defaultdict(int)
        self._returned: dict[int, int] = defaultdict(int)
        self._busy_s: dict[int, float] = defaultdict(float)
        self._waiting: list[tuple[int, int]] = []
        self._serving = False

    def run(self) -> float:
        """When the last device is done, in seconds."""
        for number in range(len(self._fleet)):
            self._start(number, 0.0)
        ended_s = 0.0
        while self._events:
            now, _, what, number = heapq.heappop(self._events)
            if what == "arrival":
                self._waiting.append((next(self._count), number))
            elif what == "free":
                self._serving = False
            else:
                ended_s = max(ended_s, self._answered(number, now))
            if self._waiting and not self._serving:
                self._serve(now)
        return ended_s

    def _start(self, number: int, now: float) -> None:
        """Forward whatever may be sent."""
        device = self._fleet[number]
        while self._sent[number] < min(self._batches, self._returned[number] + self._window):
            self._busy_s[number] = max(now, self._busy_s[number]) + device.forward_s
            self._sent[number] += 1
            self._at(self._busy_s[number] + device.link_s, "arrival", number)

    def _serve(self, now: float) -> None:
        arrivals = [
            Arrival(
                offset=offset,
                device=str(number),
                cut=self._fleet[number].cut,
                remaining=self._batches - self._served[number],
                work=_LAYERS - self._fleet[number].cut,
            )
            for offset, number in self._waiting
        ]
        first = order(arrivals, self._tails.mean_s, self._policy)[0]
        number = int(first.device)
        self._waiting.remove((first.offset, number))
        ready_s = now + serving_s(first.cut, self._tflops)
        self._tails.answered(first.device, bytes([self._served[number]]), ready_s)
        self._served[number] += 1
        self._serving = True
        self._at(ready_s, "free", number)
        self._at(ready_s + self._fleet[number].link_s, "answer", number)

    def _answered(self, number: int, now: float) -> float:
        device = self._fleet[number]
        self._busy_s[number] = done_s = max(now, self._busy_s[number]) + device.backward_s
        self._tails.returned(str(number), bytes([self._returned[number]]), done_s)
        self._returned[number] += 1
        self._start(number, done_s)
        return done_s

    def _at(self, when_s: float, what: str, number: int) -> None:
        heapq.heappush(self._events, (when_s, next(self._count), what, number))


def knowing(fleet: Sequence[Device]) -> Tails:
    """Tails as they are."""
    tails = Tails()
    tails.mean_s = {str(number): device.tail_s for number, device in enumerate(fleet)}
    return tails


def gains(
    policy: Policy,
    cuts: Sequence[int],
    tflops: float,
    *,
    draws: int,
    batches: int = 1,
    window: int = 1,
    rounds: int = 0,
    count: int = 6,
) -> list[float]:
    """What a policy takes off a round of first come, first served, as a share of it, one by one draw.

    Args:
        policy: Which.
        cuts: Of the devices, in turn.
        tflops: Of the trainer.
        draws: How many.
        batches: In a round.
        window: Of the devices.
        rounds: Before this one, in which tails are measured; 0: they are known.
        count: Of the devices.
    """
    lots, found = random.Random(1), []
    for _ in range(draws):
        fleet = devices(lots, cuts, count)
        taken_s: Mapping[Policy, float] = {
            one: _last_round(fleet, tflops, one, batches, window, rounds) for one in ("fifo", policy)
        }
        found.append(1 - taken_s[policy] / taken_s["fifo"])
    return found


def _last_round(
    fleet: Sequence[Device], tflops: float, policy: Policy, batches: int, window: int, rounds: int
) -> float:
    tails = Tails() if rounds else knowing(fleet)
    for _ in range(rounds):
        Simulation(fleet, tflops, policy, batches, window, tails).run()
    return Simulation(fleet, tflops, policy, batches, window, tails).run()
