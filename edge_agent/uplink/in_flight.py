"""Which batches are under way: sent, and not receipted. Knows no outbox and no network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from edge_agent.uplink.link_state import LinkState
from metrics.catalogue import AgentMetrics
from sidestream.host.trace import Trace

_NEWEST = 0.3  # what the last receipt counts in the mean


class InFlight:
    """Belongs to one thread.

    Args:
        link: Says when what is under way is to be sent again.
        metrics: Told how long receipts take.
        trace: Told the same.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        link: LinkState,
        *,
        metrics: AgentMetrics,
        trace: Trace,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.last = 0
        """Everything up to here is on its way, or receipted."""
        self.receipt_s: float | None = None
        """From a batch's first publish to its receipt: an exponential mean over the last few."""
        self._link = link
        self._metrics = metrics
        self._trace = trace
        self._clock = clock
        self._breaks = link.breaks
        self._first_sent: dict[int, tuple[float, int]] = {}  # by clock, and for the trace
        self._moved_s = clock()
        self._sending_s = 0.0
        self._sending_since_s: float | None = None
        self._unanswered_s: float | None = None  # since when something is sent and nothing receipted

    @property
    def under_way(self) -> bool:
        """Whether something was sent and is not receipted."""
        return bool(self._first_sent)

    @property
    def silent_s(self) -> float:
        """Since something last moved: a publish after idling, or a receipt."""
        return self._clock() - self._moved_s

    @property
    def sending_s(self) -> float:
        """Seconds with something on its way that could be receipted, since the agent joined the job."""
        since_s = self._sending_since_s
        return self._sending_s + (0.0 if since_s is None else self._clock() - since_s)

    def _is_sending(self, under_way: bool) -> None:
        now = self._clock()
        if self._sending_since_s is not None:
            self._sending_s += now - self._sending_since_s
        self._sending_since_s = now if under_way else None

    @property
    def unanswered_s(self) -> float:
        """For how long batches have been sent without any receipt; 0 if all is well, or none may be sent."""
        since_s = self._unanswered_s
        return 0.0 if since_s is None else self._clock() - since_s

    def heed_breaks(self) -> bool:
        """Begin anew if the link broke; whether it did."""
        broke, self._breaks = self._link.breaks != self._breaks, self._link.breaks
        if broke:
            self.not_awaited()
            self.restart()
        return broke

    def restart(self) -> None:
        """Whatever waits is to be sent, from the first on."""
        self.last = 0
        self.moved()

    def moved(self) -> None:
        """Something goes on its way after a while of nothing."""
        self._moved_s = self._clock()

    def not_awaited(self) -> None:
        """No receipt can come for now."""
        self._unanswered_s = None
        self._is_sending(False)

    def begin(self, sequence: int, trace_us: int) -> None:
        """A batch is about to be published: a break meanwhile means that it is published again."""
        self.last = sequence
        self._first_sent.setdefault(sequence, (self._clock(), trace_us))
        self._is_sending(True)

    def failed(self, sequence: int) -> None:
        """It was not published."""
        self.last = min(self.last, sequence - 1)
        self._is_sending(False)

    def published(self) -> None:
        """The broker has it: a receipt can be waited for."""
        if self._unanswered_s is None and not self._link.waits:
            self._unanswered_s = self._clock()

    def receipted(self, sequences: Sequence[int]) -> None:
        """These batches have left the outbox on a receipt: there is room in the window."""
        self.moved()
        self.not_awaited()
        window = self._link.flow.window if self._link.flow is not None else 1
        for sequence in sequences:
            if (sent := self._first_sent.pop(sequence, None)) is not None:
                took_s = self._moved_s - sent[0]
                self._metrics.receipt_seconds.observe(took_s)
                mean_s = took_s if self.receipt_s is None else self.receipt_s
                self.receipt_s = (1 - _NEWEST) * mean_s + _NEWEST * took_s
                # No more than a window is under way, so a lane is free again when its turn comes.
                lane = f"in flight {1 + sequence % (window + 1)}"
                self._trace.add("await receipt", lane, sent[1], batch=sequence)
        # Of batches that were given up on the way there is no receipt.
        for sequence in [sent for sent in self._first_sent if sequences and sent < sequences[-1]]:
            del self._first_sent[sequence]
        self._is_sending(bool(self._first_sent))
