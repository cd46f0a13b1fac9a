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
        self._clock = clock
        self._tails = Tails()
        self._progress: dict[str, float] = {}
        self._served: dict[str, int] = {}

    def arrived(self, ticket: Ticket) -> None:
        """A batch has come."""
        known = self._progress.get(ticket.device, 0.0)
        self._progress[ticket.device] = max(known, ticket.part.progress)

    def served(self, ticket: Ticket) -> None:
        """It is answered."""
        self._served[ticket.device] = self._served.get(ticket.device, 0) + 1
        self._tails.answered(ticket.device, ticket.part.ticket, self._clock())

    def returned(self, device: str, ticket: bytes) -> None:
        """Its device has made something of that."""
        self._tails.returned(device, ticket, self._clock())

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
        progress = sum(self._progress.values()) / max(1, len(self._progress))
        return ServeRecord(offsets=tuple(one.offset for one in chosen), progress=min(1.0, progress))

    def _remaining(self, ticket: Ticket) -> float:
        """Batches that its device has to go, this one included, by the share that it says is done."""
        done, share = self._served.get(ticket.device, 0) + 1, ticket.part.progress
        return 1.0 + done * (1 - share) / share if share > 0 else 1.0
