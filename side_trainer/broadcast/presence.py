"""That this is the job's one trainer: what it says of itself, and what it hears others say."""

from __future__ import annotations

import logging
import time
from typing import Final

import msgspec

from broker_config.transport import LastWord, Received
from side_trainer.broadcast.downlink import Downlink
from side_trainer.broadcast.leader_election import LeaderElection
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.fold.progress import Progress
from side_trainer.journal.journal import Journal
from sidestream.contract.errors import BrokerError, UntrustedError, WireError
from sidestream.contract.messages import TrainerClaim, TrainerStatus
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack, unpack

_log = logging.getLogger(__name__)
_ANSWER_EVERY_S: Final = 0.2


class Presence:
    """Belongs to the ingest thread.

    Args:
        election: Whether this is the job's one trainer.
        journal: Remembers the fence.
        link: Asks.
        downlink: Tells.
        topics: The job's.
        signer: Signs the status, and knows another trainer's.
        progress: How far the weights are.
        gone: The status that the broker tells if the connection is lost.
    """

    def __init__(
        self,
        election: LeaderElection,
        journal: Journal,
        link: LeaderTransport,
        downlink: Downlink,
        topics: Topics,
        signer: TrainerSigner,
        progress: Progress,
        gone: TrainerStatus,
    ) -> None:
        self._election = election
        self._journal = journal
        self._link = link
        self._downlink = downlink
        self._topics = topics
        self._signer = signer
        self._progress = progress
        self._gone = gone
        self._told: TrainerStatus | None = None
        self._answered = -_ANSWER_EVERY_S
        self._distrusted = False  # whether it was said that somebody poses as a trainer

    def connected(self) -> None:
        """Ask whether there is another trainer."""
        claim = self._election.connected(time.monotonic())
        try:
            self._link.ask(self._topics.trainer_claim, pack(claim))
        except BrokerError as exc:
            _log.debug("not asked for other trainers: %s", exc)

    def disconnected(self) -> None:
        """Nothing is certain any more."""
        self._election.disconnected()

    def on_event(self, event: Received) -> None:
        """What a trainer of this job, we among them, says to others.

        Raises:
            StateError: another one has taken over.
        """
        try:
            if event.topic == self._topics.trainer_claim:
                again = self._election.on_claim(unpack(TrainerClaim, event.payload))
            else:
                status = self._signer.open_status(event.payload)
                again = self._election.on_status(status, retained=event.retained)
        except WireError as exc:
            again = self._election.active and event.topic == self._topics.trainer_status
            if isinstance(exc, UntrustedError):
                self._distrust(event, exc)
        now = time.monotonic()
        if again and now - self._answered >= _ANSWER_EVERY_S:
            self._answered, self._told = now, None
            self.tell()

    def _distrust(self, event: Received, why: UntrustedError) -> None:
        if event.retained and self._signer.is_former(event.payload):
            _log.info(
                "the status that stands on the broker is of before the change of keys: ours replaces it"
            )
            return
        if self._distrusted:
            return
        self._distrusted = True
        _log.error(
            "%s was written to by somebody without this job's signing key: %s. It is ignored, and ours "
            "published again; the broker's access list should let only the trainer write there",
            *(event.topic, why),
        )

    def begins(self, now: float) -> bool:
        """Whether this is the moment from which it is certain; the status is out then.

        Raises:
            StateError: another one runs, and was not to be deposed.
        """
        if not self._election.tick(now):
            return False
        if self._journal.fence != self._election.fence:  # a full disk must not end it at a reconnect
            self._journal.fence = self._election.fence
        self._told = None
        self.tell()
        return True

    @property
    def status(self) -> TrainerStatus:
        """As it is now."""
        return msgspec.structs.replace(
            self._gone,
            state="online",
            version=self._progress.version,
            samples=self._journal.samples(),
            final=self._progress.final,
            fence=self._election.fence,
        )

    def last_words(self) -> list[LastWord]:
        """What to say while closing; nothing where another trainer has the say: the topic is its own."""
        status = msgspec.structs.replace(self.status, state="offline")
        word = LastWord(self._topics.trainer_status, self._signer.status(status), 1, True)
        return [word] if self._election.active else []

    def tell(self) -> None:
        """Publish the status, if it has changed."""
        status = self.status
        if status == self._told:
            return
        if self._downlink.send(self._topics.trainer_status, self._signer.status(status), retain=True):
            self._told = status


def offline_status(journal: Journal, election: LeaderElection) -> TrainerStatus:
    """What the broker is to tell of a trainer that starts now, once it is gone; counts the start."""
    journal.epoch += 1
    return TrainerStatus(
        state="offline",
        run=journal.run,
        epoch=journal.epoch,
        fence=election.fence,
        instance=election.instance,
    )
