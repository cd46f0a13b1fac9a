"""What is said of states that were set back: devices' by their outboxes, the trainer's by what devices miss.

Each is said once; what was lost is noted in the journal, so that a restart does not say it again.
"""

from __future__ import annotations

import logging

from broker_config.transport import Received
from metrics.fleet_page.fleet import MAX_DEVICES
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.journal.journal import Journal
from sidestream.contract.errors import WireError
from sidestream.contract.messages import HIGHEST_FENCE, Telemetry
from sidestream.contract.topics import Uplink

_log = logging.getLogger(__name__)


class Setbacks:
    """Belongs to the ingest thread.

    Args:
        journal: Remembers what was lost.
        signer: Knows our manifests.
    """

    def __init__(self, journal: Journal, signer: TrainerSigner) -> None:
        self._journal = journal
        self._signer = signer
        self._published: dict[int, dict[str, int]] = {}  # versions on the broker, with their chunks by tier
        self._highest = 0
        self._risen = 0  # of that, what the journal certainly knows: it is asked once, not by each telemetry
        self._lost = journal.lost
        self._forks = set(journal.forks)  # streams that were begun
        self._forked: set[str] = set()  # and those that were left, by their devices' batches,
        self._told: set[tuple[str, str]] = set()  # tier and device, of which it was said already

    def on_fork(self, uplink: Uplink, stream: str) -> None:
        """A batch is of another history of its stream than the one that is journaled."""
        if stream in self._forked or len(self._forked) >= MAX_DEVICES:
            return
        self._forked.add(stream)
        self._told.add((uplink.tier, uplink.device))
        _log.warning(
            "device %s (%s) sends another history of stream %s than the journaled one: its state was set "
            "back to an earlier copy, or two devices use one. It goes on with a stream of its own; nothing "
            "is lost, and no sample counts twice",
            *(uplink.device, uplink.tier, stream[:8]),
        )

    def on_telemetry(self, uplink: Uplink, told: Telemetry) -> None:
        """A device tells of a new stream, and what it could not send again after the journal was set back.

        Raises:
            StorageError: the journal cannot be written to.
        """
        if told.weights_run == self._journal.run and told.weights_version < HIGHEST_FENCE:
            self._highest = max(self._highest, told.weights_version)
            self.rise()
        if told.streams_forked:
            self._on_new_stream(uplink, told.stream)
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

    def _on_new_stream(self, uplink: Uplink, stream: str) -> None:
        """A device began a stream, mostly because it noticed by a receipt that its state was set back."""
        if stream in self._forks or len(self._forks) >= MAX_DEVICES:
            return
        self._journal.note_fork(stream)
        self._forks.add(stream)
        if (uplink.tier, uplink.device) in self._told:
            self._told.discard((uplink.tier, uplink.device))
            return
        _log.warning(
            "device %s (%s) has begun a new stream, %s: its state was set back to an earlier copy, or "
            "copied to a second device. Nothing is lost, and no sample counts twice",
            *(uplink.device, uplink.tier, stream[:8]),
        )

    def on_manifest(self, event: Received) -> None:
        """Weights that stand on the broker since before this start."""
        tier = event.topic.split("/")[-2]
        try:
            manifest = self._signer.open_manifest(event.payload, tier)
        except WireError:
            return
        if manifest.run == self._journal.run and manifest.version < HIGHEST_FENCE:
            self._published.setdefault(manifest.version, {})[tier] = manifest.chunks
            self._highest = max(self._highest, manifest.version)

    def rise(self) -> None:
        """Go on above the highest version seen, if this journal does not know of it: it was set back.

        Raises:
            StorageError: the journal cannot be written to.
        """
        if self._highest <= self._risen:
            return
        known = self._journal.highest
        if self._highest <= known:
            self._risen = self._highest
            return
        self._journal.version_base = self._highest
        self._journal.published = {**self._journal.published, self._highest: {}, **self._published}
        _log.warning(
            "this journal was set back to an earlier state: version %d of its weights was published, and it "
            "knows of none above %d. Devices send again what it lacks, and versions count on from there",
            *(self._highest, known),
        )
