"""Who is served next, from what devices have said and done."""

from __future__ import annotations

import pytest

from side_trainer.journal.records import ServeRecord
from side_trainer.split_lora.schedule import Policy
from side_trainer.split_lora.tickets import Ticket
from side_trainer.split_lora.turns import Turns
from sidestream.contract.messages import SplitPart


class Queue:
    """Batches that arrive, and are served by turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns = Turns(lambda: self.now)
        self.waiting: dict[int, Ticket] = {}
        self.count = 0

    def arrives(self, device: str, progress: float, *, rows: int = 4, tier: str = "small") -> Ticket:
        self.count += 1
        name = self.count.to_bytes(8, "little")
        part = SplitPart(ticket=name, slot=0, progress=progress, rows=rows)
        place = {"offset": self.count, "source": self.count, "sequence": self.count, "tier": tier}
        made = Ticket(device=device, stream=device, part=part, **place)  # type: ignore[arg-type]
        self.turns.arrived(made)
        self.waiting[self.count] = made
        return made

    def served(self, ticket: Ticket) -> None:
        del self.waiting[ticket.offset]
        self.turns.served(ticket)

    def next(self, policy: Policy = "longest-tail", most: int = 1) -> ServeRecord:
        return self.turns.next(self.waiting, {"small": 1, "large": 3}, 6, policy=policy, most=most)


def test_progress_is_of_all_batches_whoever_has_them() -> None:
    queue = Queue()
    queue.arrives("many", 0.01)  # of a hundred
    queue.arrives("few", 0.25)  # of four
    assert queue.next().progress == pytest.approx(2 / 104)


def test_whoever_does_not_know_how_many_it_has_is_taken_to_have_as_many_as_others() -> None:
    queue = Queue()
    queue.arrives("endless", 0.0)
    assert queue.next().progress == 0
    queue.arrives("known", 0.5)
    assert queue.next().progress == pytest.approx(1 / 4)
    queue.arrives("known", 1.0)
    assert queue.next().progress == pytest.approx(1 / 2)


def test_what_remains_is_counted_in_batches() -> None:
    queue = Queue()
    queue.arrives("little", 0.5)
    much = queue.arrives("much", 0.1)
    assert queue.next().offsets == (much.offset,)


@pytest.mark.parametrize("recalled", [False, True])
def test_what_was_served_does_not_remain_even_if_that_was_before_a_restart(recalled: bool) -> None:
    queue = Queue()
    for number in range(1, 9):
        ticket = queue.arrives("far", number / 10)
        del queue.waiting[ticket.offset]
        (queue.turns.recalled if recalled else queue.turns.served)(ticket)
    queue.arrives("far", 0.9)  # two of ten are left
    begun = queue.arrives("begun", 0.25)  # four of four
    assert queue.next().offsets == (begun.offset,)


def test_a_slow_device_goes_first() -> None:
    queue = Queue()
    for device, takes_s in (("quick", 1.0), ("slow", 3.0)):
        ticket = queue.arrives(device, 0.5)
        queue.served(ticket)
        queue.now += takes_s
        queue.turns.returned(device, ticket.part.ticket)
    assert queue.turns.tails_s == {"quick": 1.0, "slow": 3.0}
    quick, slow = queue.arrives("quick", 1.0), queue.arrives("slow", 1.0)
    assert queue.next().offsets == (slow.offset,)
    assert queue.next("fifo").offsets == (quick.offset,)


def test_work_is_rows_times_the_layers_that_are_the_trainers() -> None:
    queue = Queue()
    deep = queue.arrives("a", 0.5, rows=8, tier="large")  # 8 × 3
    shallow = queue.arrives("b", 0.5, rows=5, tier="small")  # 5 × 5
    assert queue.next("workload").offsets == (shallow.offset,)
    assert queue.next("fifo", most=2).offsets == (deep.offset,)  # of another cut
