"""A budget is kept, and it is used: on a clock that is turned by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.store.streams import Slot
from edge_agent.uplink.budget import Allowance, Ladder, LinkBudget, SampleBudget, choose
from edge_agent.uplink.in_flight import InFlight
from edge_agent.uplink.link_state import LinkState
from edge_agent.uplink.sender import Sender
from metrics.catalogue import AgentMetrics
from sidestream.contract.plan import FlowPlan
from sidestream.contract.sampling import DEFAULT_LADDER, Rung, parse_sampling
from sidestream.contract.tensors import Codec, encoded_sizes
from sidestream.host.trace import Trace
from tests import outboxes

TAPS, WIDTH, ROWS = 3, 384, 16
OVERHEAD = 380


def body(rung: Rung, lengths: Sequence[int]) -> int:
    sampling = parse_sampling(rung.sampling)
    vectors = sum(sampling.most_tokens(length) for length in lengths)
    return sum(encoded_sizes(rung.codec, (TAPS, vectors, WIDTH))) + 8 * len(lengths)


def bodies(lengths: Sequence[int]) -> list[int]:
    return [body(rung, lengths) for rung in DEFAULT_LADDER]


# --- one choice ------------------------------------------------------------------------------------------

COSTS = [100.0, 90.0, 10.0]


@pytest.mark.parametrize(
    ("allowance", "rung"),
    [
        (Allowance(100, 0), 0),
        (Allowance(95, 0), 1),
        (Allowance(95, 5), 0),
        (Allowance(50, 39), 2),
        (Allowance(50, 40), 1),
        (Allowance(50, 50), 1),  # not the richest: the budget lies between the lower two
        (Allowance(50, 160), 0),  # but for what lies idle
        (Allowance(50, -45), 2),
        (Allowance(1, 0), 2),
    ],
)
def test_the_rung_is_the_one_below_the_budget_or_the_one_above(allowance: Allowance, rung: int) -> None:
    assert choose(COSTS, allowance) == rung


def test_a_rung_that_fits_no_message_is_never_chosen_while_another_does() -> None:
    assert choose([float("inf"), 90.0, 10.0], Allowance(1e9, 1e9)) == 1
    assert choose([float("inf"), 90.0, float("inf")], Allowance(1, 0)) == 1


# --- bytes_per_sample ------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    mean_length=st.integers(6, 60),
    share=st.floats(0.05, 0.9),
    by_length=st.booleans(),
)
@settings(max_examples=25)
def test_the_mean_of_a_sample_comes_up_to_its_budget_and_never_passes_it(
    seed: int, mean_length: int, share: float, by_length: bool
) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.poisson(mean_length, (400, ROWS)), 3, 128)
    if by_length:  # as the producer does: four batches at a time, the short ones first
        lengths = np.sort(lengths.reshape(100, 4 * ROWS), axis=1).reshape(400, ROWS)
    per_sample = [
        (sum(bodies(row)[rung] for row in lengths) + 400 * OVERHEAD) / lengths.size for rung in (0, -1)
    ]
    budget = int(per_sample[1] * 1.2 + 8 + share * (per_sample[0] * 0.95 - per_sample[1] * 1.2))
    ladder, total = Ladder(len(DEFAULT_LADDER), sample=SampleBudget(budget)), 0
    for count, row in enumerate(lengths, start=1):
        sizes = bodies(row.tolist())
        rung = ladder.choose(sizes, ROWS)
        overhead = OVERHEAD - int(rng.integers(0, 5)) * (count > 1)
        ladder.spent(sizes[rung] + overhead, sizes[rung], ROWS)
        total += sizes[rung] + overhead
        assert total <= budget * ROWS * count
    assert total >= 0.95 * budget * lengths.size


def test_two_neighbouring_rungs_take_turns_where_none_fits() -> None:
    ladder = Ladder(3, sample=SampleBudget(70))
    chosen = []
    for _ in range(40):
        chosen.append(ladder.choose([800, 400, 100], 10))
        ladder.spent([800, 400, 100][chosen[-1]], [800, 400, 100][chosen[-1]], 10)
    assert set(chosen[2:]) == {0, 1}
    assert 0.6 <= chosen.count(0) / 40 <= 0.8


def test_a_budget_that_nothing_keeps_is_told_of_once_and_the_cheapest_is_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ladder = Ladder(2, sample=SampleBudget(10))
    for _ in range(5):
        assert ladder.choose([900, 500], 4) == 1
        ladder.spent(500, 500, 4)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_without_a_budget_there_is_nothing_to_choose() -> None:
    assert Ladder(1).choose([1e9], 1) == 0


# --- max_kib_per_minute ----------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Device:
    """A real outbox and sender with a budget, and a producer that is a list of costs."""

    def __init__(self, folder: Path, broker: InProcessBroker, kib: float) -> None:
        self.clock = Clock()
        self.budget = LinkBudget(kib, self.clock)
        self.outbox = Outbox(folder, job="j", device="d", tier="t", max_bytes=10**9)
        self.transport = broker.transport("d", max_packet_bytes=10**6)
        self.transport.start(lambda event: None)
        assert self.transport.wait_connected(20)
        self.link = LinkState()
        self.link.begin(FlowPlan(window=4, retry_s=3600.0))
        self.in_flight = InFlight(
            self.link, metrics=AgentMetrics(CollectorRegistry()), trace=Trace(), clock=self.clock
        )
        self.sender = Sender(
            self.outbox,
            self.transport,
            "up",
            "adapter",
            link=self.link,
            in_flight=self.in_flight,
            trace=Trace(),
            budget=self.budget,
        )
        self.link.connection(True)
        self.up = True
        self.sent: list[tuple[float, int]] = []
        self.rungs: list[int] = []

    def produce(self, costs: Sequence[int]) -> None:
        ladder = Ladder(len(costs), link=self.budget, backlog=lambda: self.outbox.size()[1])
        rung = ladder.choose(costs, ROWS)
        self.rungs.append(rung)
        self.outbox.append_all([(lambda slot: message(slot, costs[rung]), ROWS)], Consumed())
        self.link.wake()

    def live(self, seconds: float) -> None:
        """Send what may be sent, for so long; every batch is receipted at once."""
        end_s = self.clock.now + seconds
        while True:
            before = self.outbox.counters()["bytes_up"]
            if self.up and self.sender.send_next():
                self.sent.append((self.clock.now, self.outbox.counters()["bytes_up"] - before))
                upto = self.outbox.streams.first_waiting()
                self.in_flight.receipted(
                    self.outbox.streams.receipt(outboxes.receipt_for(self.outbox, upto)).sequences
                )
                continue
            idle_s = self.budget.wait_s() if self.up and self.outbox.size()[0] else seconds
            if self.clock.now + idle_s >= end_s:
                self.clock.now = end_s
                return
            self.clock.now += max(idle_s, 1e-3)

    def bytes_between(self, start_s: float, end_s: float) -> int:
        return sum(size for when_s, size in self.sent if start_s <= when_s < end_s)


def message(slot: Slot, width: int) -> bytes:
    return outboxes.message(slot, width=width, codec=Codec.INT8)


@pytest.fixture(name="device")
def _device() -> Iterator[Callable[[float], Any]]:
    with InProcessBroker() as broker:

        @contextmanager
        def make(kib: float) -> Iterator[Device]:
            with tempfile.TemporaryDirectory() as folder:
                one = Device(Path(folder), broker, kib)
                yield one
                one.transport.close()
                one.outbox.close()

        yield make


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    interval_s=st.floats(0.5, 40),
    over=st.floats(1.3, 30),
    falls=st.lists(st.sampled_from([2, 3, 5]), min_size=2, max_size=4),
)
@settings(max_examples=10)
def test_a_minute_holds_the_budget_and_at_most_one_message_more(
    seed: int, interval_s: float, over: float, falls: list[int]
) -> None:
    """``over``: how much more than the budget the richest rung would send."""
    kib = 60.0
    richest = over * kib * 1024 / 60 * interval_s
    costs = [int(richest / np.prod(falls[:rung])) + 20 for rung in range(len(falls) + 1)]
    costs = [min(cost, 400_000) for cost in costs]
    rng = np.random.default_rng(seed)
    with InProcessBroker() as broker, tempfile.TemporaryDirectory() as folder:
        device = Device(Path(folder), broker, kib)
        start_s, batches = device.clock.now, max(60, min(200, int(900 / interval_s)))
        for _ in range(batches):
            scale = rng.uniform(0.8, 1.2)
            device.produce([int(cost * scale) for cost in costs])
            device.live(interval_s * rng.uniform(0.5, 1.5))
        end_s = device.clock.now
        device.transport.close()
        device.outbox.close()
    largest = max(size for _, size in device.sent)
    budget = kib * 1024
    for when_s, _ in device.sent:
        assert device.bytes_between(when_s, when_s + 60) <= budget + largest
    total = device.bytes_between(start_s, end_s)
    assert total <= budget * (end_s - start_s) / 60 + largest
    assert total >= 0.95 * budget * (end_s - start_s) / 60 - largest


def test_the_rung_follows_the_link_down_and_up(device: Any) -> None:
    costs = [40_000, 20_000, 10_000, 5_000, 1_000]
    with device(120.0) as one:  # 2 KiB a second; a batch every 5 seconds

        def phase(batches: int) -> list[int]:
            before = len(one.rungs)
            for _ in range(batches):
                one.produce(costs)
                one.live(5.0)
            return list(one.rungs[before:])

        phase(30)
        steady = phase(60)
        assert set(steady) <= {1, 2, 3} and {2} <= set(steady)
        one.up = False
        outage = phase(24)
        assert outage[-1] == 4 and outage.count(4) > 12
        one.up = True
        phase(40)
        again = phase(60)
        assert set(again) <= {1, 2, 3} and {2} <= set(again)


def test_a_backlog_from_before_a_restart_is_sent_at_the_budgets_rate(device: Any) -> None:
    with device(60.0) as one:
        for _ in range(100):
            one.outbox.append_all([(lambda slot: message(slot, 3000), 1)], Consumed())
        one.live(120.0)
        assert 0.95 * 120 * 1024 <= one.bytes_between(0, 1e9) <= 120 * 1024 + 3500
        one.produce([9000, 100])
        assert one.rungs == [1]


def test_whatever_is_published_counts(device: Any) -> None:
    with device(60.0) as one:
        one.budget.spent(10 * 1024)
        one.outbox.append_all([(lambda slot: message(slot, 100), 1)], Consumed())
        one.live(9.5)
        assert one.sent == []
        one.live(1.0)
        assert len(one.sent) == 1


def test_a_repeat_is_paid_for_as_well(device: Any) -> None:
    with device(60.0) as one:
        one.outbox.append_all([(lambda slot: message(slot, 2500), 1)], Consumed())
        assert one.sender.send_next()
        one.link.send_again()
        assert not one.sender.send_next() and one.budget.wait_s() > 2.4
        one.clock.now += one.budget.wait_s() + 0.01
        assert one.sender.send_next()


def test_a_slow_device_leaves_the_link_what_it_does_not_need(device: Any) -> None:
    with device(600.0) as one:
        for _ in range(50):
            one.produce([5000, 1000])
            one.live(5.0)
        assert set(one.rungs) == {0} and len(one.sent) == 50
