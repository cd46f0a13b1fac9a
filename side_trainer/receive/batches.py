"""Activation batches: checked, journaled in one commit, and only then receipted."""

from __future__ import annotations

import contextlib
import time
from typing import NamedTuple

from broker_config.transport import Received
from metrics.catalogue import Kind, TrainerMetrics
from side_trainer.broadcast.downlink import Downlink
from side_trainer.job import Job
from side_trainer.journal.decoded import Decoded
from side_trainer.journal.journal import Claim, Journal, Taken
from side_trainer.quarantine.judge import Judge
from side_trainer.receive.adapter_messages import examine_adapter
from side_trainer.receive.inbox import Examined, Refused, arrived, examine
from side_trainer.receive.refusals import Refusals
from side_trainer.receive.setbacks import Setbacks
from side_trainer.receive.shut_out import ShutOut
from sidestream.contract.errors import NoRoomError
from sidestream.contract.messages import ActivationBatch, content_digest
from sidestream.contract.topics import Uplink
from sidestream.host.trace import Trace


class _Admitted(NamedTuple):
    """A batch that may be journaled."""

    uplink: Uplink
    event: Received
    examined: Examined


class Batches:
    """Belongs to the ingest thread.

    Args:
        journal: Where they go.
        job: Has the plan that they are held against.
        judge: Says whose are not learnt from.
        downlink: For receipts.
        refusals: For those that are not taken.
        setbacks: Told of forks.
        shut_out: Told who is honest.
        metrics: Counts them.
        trace: Told what is done when.
    """

    def __init__(
        self,
        journal: Journal,
        job: Job,
        judge: Judge,
        downlink: Downlink,
        refusals: Refusals,
        setbacks: Setbacks,
        shut_out: ShutOut,
        metrics: TrainerMetrics,
        trace: Trace,
    ) -> None:
        self._journal = journal
        self._job = job
        self._judge = judge
        self._downlink = downlink
        self._refusals = refusals
        self._setbacks = setbacks
        self._shut_out = shut_out
        self._metrics = metrics
        self._trace = trace

    def take(self, heard: list[tuple[Uplink, Received]]) -> bool:
        """Journal what may be, then send the receipts; return whether there was anything.

        Raises:
            StateError: the journal cannot be written to, and nothing was receipted.
        """
        began, started = self._trace.now(), time.monotonic()
        admitted = [one for uplink, event in heard if (one := self._admit(uplink, event)) is not None]
        journaled = self._journal_all(admitted) if admitted else []
        for uplink, stream in {(one.uplink, one.examined.batch.stream): None for one in journaled}:
            self._downlink.receipt(uplink, stream)
            self._shut_out.honest(uplink.tier, uplink.device)
        if heard:
            self._metrics.ingest_seconds.observe(time.monotonic() - started)
        if journaled:
            names = [f"{one.uplink.device} {one.examined.batch.sequence}" for one in journaled]
            self._trace.add("ingest", "ingest", began, batches=names)
        return bool(journaled)

    def _admit(self, uplink: Uplink, event: Received) -> _Admitted | None:
        try:
            if uplink.kind == Kind.ADAPTER.value:
                found = examine_adapter(event.payload, uplink.tier, self._job.plan)
            else:
                found = examine(event.payload, uplink.tier, self._job.plan, self._job.policies)
        except Refused as exc:
            self._refusals.refuse(uplink, event, exc)
            return None
        return _Admitted(uplink, event, found)

    def _journal_all(self, admitted: list[_Admitted]) -> list[_Admitted]:
        """Append what is new; return everything that is in the journal now and may be receipted."""
        started = time.monotonic()
        with self._journal.transaction():
            done = [self._append(one) for one in admitted]
        self._metrics.journal_commit_seconds.observe(time.monotonic() - started)
        for one, taken in zip(admitted, done, strict=True):
            if taken is None:
                self._refusals.have_wait(
                    one.uplink, one.event, one.examined.batch, self._judge.held_max_bytes
                )
            elif taken.claim is Claim.FORKED:
                self._on_fork(one)
            else:
                self._on_taken(one, taken)
        safe = (Claim.NEW, Claim.KNOWN)
        return [one for one, taken in zip(admitted, done, strict=True) if taken and taken.claim in safe]

    def _append(self, one: _Admitted) -> Taken | None:
        """None if its device is held, and there is no room for more of what is."""
        with contextlib.suppress(NoRoomError):
            return self._journal.append_batch(
                arrived(one.examined.batch, one.event.payload, one.uplink.tier, one.uplink.device),
                held=self._judge.holds(one.uplink.device),
                held_max_bytes=self._judge.held_max_bytes,
            )
        return None

    def _on_fork(self, one: _Admitted) -> None:
        """Its device goes on with another stream."""
        batch = one.examined.batch
        self._metrics.messages_forked.labels(one.uplink.tier).inc()
        self._setbacks.on_fork(one.uplink, batch.stream)
        self._downlink.receipt(
            one.uplink,
            batch.stream,
            forked_sequence=batch.sequence,
            forked_digest=content_digest(batch),
        )

    def _on_taken(self, one: _Admitted, taken: Taken) -> None:
        tier, device = one.uplink.tier, one.uplink.device
        self._metrics.up_bytes.labels(tier).inc(len(one.event.payload))
        self._metrics.samples_repeated.labels(tier).inc(taken.repeated)
        if taken.claim is Claim.KNOWN:
            self._metrics.messages_duplicate.labels(tier).inc()
        elif not self._judge.holds(device):
            self._metrics.messages_journaled.labels(tier).inc()
            self._metrics.samples_journaled.labels(tier).inc(taken.samples)
            batch, values, means = one.examined
            if isinstance(batch, ActivationBatch) and values is not None and means is not None:
                if taken.offset:
                    self._journal.decoded.put(taken.offset, Decoded(batch, values))
                self._judge.on_batch(tier, device, batch, means)
