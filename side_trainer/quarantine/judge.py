"""Which devices are not learnt from: what is suspected, what was decided, and the operator's say.

Batches are held against the fleet as they are journaled, and again as they are learnt; a verdict is written
down by the ingest thread alone, a step later.
"""

from __future__ import annotations

import logging
import queue
import sys

import numpy as np

from metrics.fleet_page.fleet import MAX_DEVICES
from side_trainer.journal.journal import Journal
from side_trainer.quarantine.agreement import Agreement
from side_trainer.quarantine.quarantine import Quarantine
from side_trainer.quarantine.suspicion import Suspicion, row_sizes
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.tensors import Floats

_log = logging.getLogger(__name__)


class Judge:
    """Suspects devices, and quarantines them.

    Args:
        journal: Where verdicts are kept.
        suspects: Whether devices are quarantined that send nothing like the others.
        by_labels: Whether samples have a label each. Then it is asked whether these suit the samples, and
            the loss does not count: a device with few labels is honestly harder than others, by any measure.
        held_max_bytes: Of what quarantined devices send, all together.
    """

    def __init__(
        self, journal: Journal, *, suspects: bool, by_labels: bool, held_max_bytes: int = sys.maxsize
    ) -> None:
        self.held_max_bytes = held_max_bytes
        """Of what is kept and not learnt from."""
        self._journal = journal
        self._suspects = suspects
        self._by_labels = by_labels
        self._quarantine = Quarantine(journal)
        self._suspicion = Suspicion()
        self._agreement = Agreement()
        self._found: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._owners: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Devices that are held, the excluded ones included."""
        return self._quarantine.count

    def holds(self, device: str) -> bool:
        """Whether a device's batches are kept and not learnt from."""
        return self._quarantine.holds(device)

    def on_batch(self, tier: str, device: str, batch: ActivationBatch, means: Floats) -> None:
        """Hold a new batch against the fleet's.

        Args:
            tier: Of the device.
            device: Its id.
            batch: What it sent.
            means: [B, K, d]: the rows' mean vectors.
        """
        if not self._suspects or self.holds(device):
            return
        why = self._suspicion.note_size(tier, device, row_sizes(means))
        if not why and self._by_labels:
            why = self._agreement.note(tier, device, means, np.asarray(batch.read_targets()))
        if why:
            self._found.put((device, why))

    def on_loss(self, tier: str, stream: str, loss: float) -> None:
        """Hold the loss of a batch against the fleet's; for the learner's thread."""
        if not self._suspects or self._by_labels:
            return
        device = self._device_of(stream)
        if self.holds(device):
            return
        if why := self._suspicion.note_loss(tier, device, loss):
            self._found.put((device, why))

    def decide(self) -> None:
        """Quarantine those that were found suspect meanwhile.

        Raises:
            StateError: the journal cannot be written to.
        """
        while not self._found.empty():
            device, why = self._found.get()
            if self._quarantine.suspect(device, why):
                self._agreement.forget(device)
                _log.error(
                    "device %s is quarantined: %s. What it sends is kept and not learnt from; see sidestream "
                    "trainer quarantine list",
                    *(device, why),
                )

    def follow_operator(self) -> list[tuple[str, int]]:
        """Do what was decided on the command line meanwhile.

        Returns:
            Tier and samples of each held batch that became a record.

        Raises:
            StateError: the journal cannot be written to.
        """
        return self._quarantine.refresh()

    def _device_of(self, stream: str) -> str:
        if stream not in self._owners:
            state = self._journal.stream(stream)
            assert state is not None
            if len(self._owners) > MAX_DEVICES:
                self._owners.clear()
            self._owners[stream] = state.device
        return self._owners[stream]
