"""What all devices are told: the plan, and the flow; said again when somebody else wrote in their place."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from broker_config.transport import Received
from side_trainer.broadcast.downlink import Downlink
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.retained import Retained
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.job import Job
from sidestream.contract.errors import StateError
from sidestream.contract.messages import CodebooksChunk, Flow
from sidestream.contract.topics import Topics
from sidestream.contract.wire import TARGET_MESSAGE_BYTES, pack

_log = logging.getLogger(__name__)
_STORAGE_RETRY_S: Final = 5.0
_REPAIR_EVERY_S: Final = 5.0
_HEADERS_BYTES: Final = 1024
_LEAST_CHUNK_BYTES: Final = 1024


class Announcements:
    """Belongs to the ingest thread.

    Args:
        job: Has the plan.
        link: Has the fence.
        downlink: Tells.
        topics: The job's.
        retained: Knows what is ours on the broker.
        signer: Signs the plan.
        wake: Wakes the learner; with ``True`` to have it publish again.
    """

    def __init__(
        self,
        job: Job,
        link: LeaderTransport,
        downlink: Downlink,
        topics: Topics,
        retained: Retained,
        signer: TrainerSigner,
        wake: Callable[[bool], None],
    ) -> None:
        self._job = job
        self._link = link
        self._downlink = downlink
        self._topics = topics
        self._retained = retained
        self._signer = signer
        self._wake = wake
        self._announced = -1  # the last revision of the plan that the broker has
        self._handed_out: set[tuple[str, str]] = set()  # tiers and codebooks
        self._paused = False
        self._repaired = -_REPAIR_EVERY_S

    def begin(self) -> None:
        """Say everything, from the moment from which this is certainly the job's one trainer."""
        self._handed_out.clear()
        self.plan()
        self.flow()
        self._downlink.pay()
        self._wake(True)

    def plan(self) -> None:
        """Publish the plan, and before it the codebooks that it names."""
        owed = not self._hand_out()
        plan = msgspec.structs.replace(self._job.plan, fence=self._link.fence)
        payload = self._signer.plan(plan)
        self._retained.publishing(self._topics.plan, payload)
        if self._downlink.send(self._topics.plan, payload, retain=True):
            self._announced = -1 if owed else plan.revision
        self._wake(False)

    def _hand_out(self) -> bool:
        """Publish codebooks that the broker has not yet; return whether it has all of them."""
        for name, tier in self._job.plan.tiers.items():
            if tier.codebooks and (name, tier.codebooks) not in self._handed_out:
                if not all(self._chunks(name, tier.codebooks)):
                    return False
                self._handed_out.add((name, tier.codebooks))
        return True

    def _chunks(self, tier: str, id_: str) -> Iterator[bool]:
        payload = self._job.codebooks.payload(id_)
        room = min(TARGET_MESSAGE_BYTES, self._link.max_packet_bytes) - _HEADERS_BYTES
        size = max(room, _LEAST_CHUNK_BYTES)
        starts = range(0, len(payload), size)
        for index, start in enumerate(starts):
            part = payload[start : start + size]
            message = pack(CodebooksChunk(id=id_, index=index, chunks=len(starts), data=part))
            topic = self._topics.codebooks(tier, index)
            self._retained.publishing(topic, message)
            yield self._downlink.send(topic, message, retain=True, tier=tier)

    def catch_up(self) -> None:
        """Publish the plan if the one in force could not be."""
        if self._job.plan.revision != self._announced:
            self.plan()

    def flow(self) -> None:
        """Publish how fast devices may send."""
        plan = self._job.plan
        flow = pack(Flow(window=plan.flow.window, pause=self._paused))
        for tier in plan.tiers:
            self._downlink.send(self._topics.flow(tier), flow, retain=True, tier=tier)

    def pause(self, pause: bool) -> None:
        """Have the devices wait, or go on."""
        if pause != self._paused:
            self._paused = pause
            self.flow()

    def storage_failed(self, exc: StateError) -> None:
        """Nothing was receipted, so nothing is lost: the devices keep it. Ask them to wait, and try again."""
        _log.error(
            "%s; the devices are paused and keep their data. Free disk space, or mend the state directory",
            exc,
        )
        self.pause(True)
        time.sleep(_STORAGE_RETRY_S)
        self.pause(False)

    def on_retained(self, event: Received, now: float) -> None:
        """Put the plan and the weights back if somebody else wrote over them.

        What the broker has kept from before we subscribed is likely our own, of an earlier start.
        """
        if self._retained.is_foreign(event.topic, event.payload) and now - self._repaired >= _REPAIR_EVERY_S:
            self._repaired = now
            self._handed_out.clear()
            if event.retained:
                _log.debug("%s was on the broker before this start; publishing ours again", event.topic)
            else:
                _log.warning(
                    "%s was written to by somebody else; publishing ours again. If this job has no other "
                    "trainer, a stranger can write there: give the broker an access list, and the trainer a "
                    "key to sign with (sidestream fleet init makes both)",
                    event.topic,
                )
            self.plan()
            self._wake(True)
