"""Who is served next: what waits, as the schedule sees it, and how long devices take, as it is measured.

Nothing here goes into the fold: what is chosen is journaled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from side_trainer.journal.records import ServeRecord
from side_trainer.split_lora.schedule import Arrival, Policy, Tails, order, together
from side_trainer.split_lora.tickets import Ticket


class Turns:
    """Chooses.

    Args:
        clock: Seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        """Seconds that only rise; by another one in simulations."""
        self._tails = Tails()
        self._shares: dict[str, float] = {}  # by device, of its passes, as it said last
        self._arrived: dict[str, int] = {}
        self._served: dict[str, int] = {}

    def arrived(self, ticket: Ticket) -> None:
        """A batch has come."""
        device = ticket.device
        self._arrived[device] = self._arrived.get(device, 0) + 1
        self._shares[device] = max(self._shares.get(device, 0.0), ticket.part.progress)

    def served(self, ticket: Ticket) -> None:
        """It is answered."""
        self.recalled(ticket)
        self._tails.answered(ticket.device, ticket.part.ticket, self.clock())

    def recalled(self, ticket: Ticket) -> None:
        """It was answered in a life before this one: when, is not known."""
        self._served[ticket.device] = self._served.get(ticket.device, 0) + 1

    def returned(self, device: str, ticket: bytes) -> None:
        """Its device has made something of that."""
        self._tails.returned(device, ticket, self.clock())

    @property
    def tails_s(self) -> Mapping[str, float]:
        """By device, how long it takes for one batch once that is answered."""
        return self._tails.mean_s

    def next(
        self,
        waiting: Mapping[int, Ticket],
        cuts: Mapping[str, int],
        depth: int,
        *,
        policy: Policy,
        most: int,
    ) -> ServeRecord:
        """What is served next.

        Args:
            waiting: By record; not empty.
            cuts: By tier.
            depth: Layers of the whole model.
            policy: The order.
            most: How many may share an update.
        """
        arrivals = [
            Arrival(
                offset=offset,
                device=one.device,
                cut=cuts[one.tier],
                remaining=self._remaining(one),
                work=one.part.rows * (depth - cuts[one.tier]),
            )
            for offset, one in waiting.items()
        ]
        chosen = together(order(arrivals, self.tails_s, policy), most)
        return ServeRecord(offsets=tuple(one.offset for one in chosen), progress=self._progress())

    def _progress(self) -> float:
        """The share of all batches that has come; who does not say counts as usual."""
        known = {device: self._arrived[device] / share for device, share in self._shares.items() if share > 0}
        if not known:
            return 0.0
        come = sum(self._arrived[device] for device in known)
        usual = sum(known.values()) / len(known)
        return min(1.0, come / (usual * len(self._shares)))

    def _remaining(self, ticket: Ticket) -> float:
        """Batches that its device has to go, this one included, by the share that it says is done."""
        done, share = self._served.get(ticket.device, 0) + 1, ticket.part.progress
        return 1.0 + done * (1 - share) / share if share > 0 else 1.0
