"""What is said of states that were set back: devices' by their outboxes, the trainer's by what devices miss.

Each is said once; what was lost is noted in the journal, so that a restart does not say it again.
"""

from __future__ import annotations

import logging
from typing import Final

from contract.messages import Telemetry
from contract.topics import Uplink
from side_trainer.journal import Journal

_log = logging.getLogger(__name__)
_REMEMBERED: Final = 10_000


class Setbacks:
    """Belongs to the ingest thread.

    Args:
        journal: Remembers what was lost.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lost = journal.lost
        self._forked: set[str] = set()

    def on_fork(self, uplink: Uplink, stream: str) -> None:
        """A batch is of another history of its stream than the one that is journaled."""
        if stream in self._forked or len(self._forked) >= _REMEMBERED:
            return
        self._forked.add(stream)
        _log.warning(
            "device %s (%s) sends another history of stream %s than the journaled one: its state was set "
            "back to an earlier copy, or two devices use one. It goes on with a stream of its own; nothing "
            "is lost, and no sample counts twice",
            *(uplink.device, uplink.tier, stream[:8]),
        )

    def on_telemetry(self, uplink: Uplink, told: Telemetry) -> None:
        """A device tells what it could not send again after the journal was set back.

        Raises:
            StorageError: the journal cannot be written to.
        """
        before = self._lost.get(told.stream, 0)
        if told.samples_lost <= before:
            return
        self._journal.note_lost(told.stream, told.samples_lost)
        self._lost[told.stream] = told.samples_lost
        _log.error(
            "device %s (%s): %d samples that were receipted before this journal was set back are LOST: the "
            "device no longer keeps them. Back up more often, or raise keep_receipted_share on devices",
            *(uplink.device, uplink.tier, told.samples_lost - before),
        )
