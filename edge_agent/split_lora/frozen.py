"""A device whose layers stay as they are: each batch is forwarded and sent once, and nothing comes back."""

from __future__ import annotations

from typing import Final

from edge_agent.batches.patience import Patience
from edge_agent.context import AgentContext
from edge_agent.split_lora.departures import Departures
from edge_agent.split_lora.intake import BatchIntake
from edge_agent.split_lora.stored_batches import StoredBatches
from sidestream.backbone.backbone import Backbone

_WAIT_S: Final = 0.2


class FrozenUpload:
    """Belongs to one thread.

    Args:
        context: The agent's.
        backbone: The first layers.
        intake: Makes batches of samples.
        batches: Has them.
        departures: Sends them.
        pad: The token where a row has ended.
        patience: Waits.
    """

    def __init__(
        self,
        context: AgentContext,
        backbone: Backbone,
        intake: BatchIntake,
        batches: StoredBatches,
        departures: Departures,
        *,
        pad: int,
        patience: Patience,
    ) -> None:
        self._context = context
        self._backbone = backbone
        self._intake = intake
        self._batches = batches
        self._departures = departures
        self._pad = pad
        self._patience = patience

    def run(self) -> None:
        """Send until everything is sent.

        Raises:
            DataError: the source cannot be read.
            StateError: the outbox cannot be written.
        """
        try:
            while not self._patience.stopped():
                busy = False if self._intake.ended else self._intake.read()
                if self._send_next() or busy:
                    self._patience.between()
                    continue
                if self._intake.ended and not self._batches.left:
                    return
                self._patience.pause(_WAIT_S)
        finally:
            self._intake.give_back()

    def _send_next(self) -> bool:
        if not self._context.outbox.has_room() or (batch := self._batches.next()) is None:
            return False
        started, began = self._context.clock(), self._context.trace.now()
        states = self._backbone.states(batch.body.tokens(self._pad), self._backbone.depth)
        seconds = self._context.clock() - started
        self._context.trace.add("forward", "compute", began, samples=len(batch.body.ids))
        self._context.metrics.batch_forward_seconds.observe(seconds)
        self._departures.depart(batch, states, seconds, ended=self._intake.ended, answered=False)
        return True
