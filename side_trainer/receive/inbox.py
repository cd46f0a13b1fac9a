"""What the network thread hands over: a bounded queue, and the check that every batch must pass.

The check is pure; nothing that a device can send gets past it in a shape that the journal or the fold would
trip over.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from broker_config.transport import Event, Received
from metrics.catalogue import Kind, Reason
from side_trainer.journal.adapter_arrived import adapter_arrived, misplaced, repeat_of
from side_trainer.journal.journal import Arrived
from side_trainer.receive.penalty import PenaltyBox
from sidestream.contract.errors import ConfigError, DecodeError
from sidestream.contract.messages import ActivationBatch, AdapterMessage, content_digest
from sidestream.contract.plan import Plan, Split, TierPlan, labels_id
from sidestream.contract.sampling import parse_sampling
from sidestream.contract.tasks import TASKS, Task, check_targets
from sidestream.contract.tensors import Floats, decode
from sidestream.contract.wire import MAX_MESSAGE_BYTES, pack, unpack

MAX_MESSAGES: Final = 8192
MAX_BYTES: Final = 64 * 2**20
SHARE_MESSAGES: Final = 1024
SHARE_BYTES: Final = 16 * 2**20
"""Of one sender. One sends a window at most: eight batches of a quarter of a MiB, or as the plan says."""
_ROOM: Final[Mapping[str, float]] = {Kind.STATUS.value: 4, Kind.TELEMETRY.value: 0.5}
"""Times the room for all, by kind: each birth and will is said once, and thousands at one moment when a fleet
comes back; telemetry is said again, and then says more."""
_TELEMETRY: Final = Kind.TELEMETRY.value
_TELEMETRY_EVERY: Final = 4
MAX_ACTIVATION: Final = 1e6
"""Larger ones are refused: their squares, which normalising takes, would leave float32 sooner or later. The
"massive activations" of real transformers stay below 1e5."""


_NONE: Final[Mapping[str, AbstractSet[str]]] = MappingProxyType({})


class Refused(Exception):  # noqa: N818 - not an error of ours: the sender's message is at fault
    """A message that will never be used.

    Args:
        reason: For the metrics.
        text: For an operator to read.
        batch: The message, if it could be decoded: its device can then be told.
    """

    def __init__(
        self, reason: Reason, text: str, batch: ActivationBatch | AdapterMessage | None = None
    ) -> None:
        super().__init__(text)
        self.reason = reason
        self.batch = batch


class _Lane:
    """What one sender has waiting."""

    def __init__(self, name: str, turns: deque[_Lane]) -> None:
        self.name = name
        self.turns = turns
        self.events: deque[Event] = deque()
        self.bytes = 0


class Inbox:
    """Events on their way from the network thread, bounded in number and bytes.

    A message that finds it full is dropped and counted; its device sends it again when no receipt comes. What
    nobody says again is dropped last, and telemetry first. Each sender has a share of its own, and they take
    turns: one that sends more than its share pays for it in the penalty box, and the others go on. Telemetry
    has lanes and turns of its own, one in four while other messages wait: nobody waits for an answer to it.

    Args:
        max_messages: Room for all.
        max_bytes: Likewise.
        share_bytes: Room for one sender.
        box: Says what is thrown away unread.
    """

    def __init__(
        self,
        *,
        max_messages: int = MAX_MESSAGES,
        max_bytes: int = MAX_BYTES,
        share_bytes: int = SHARE_BYTES,
        box: PenaltyBox | None = None,
    ) -> None:
        self.box = box if box is not None else PenaltyBox()
        self._share_bytes = share_bytes
        self._lanes: dict[str, _Lane] = {}
        self._turns: deque[_Lane] = deque()
        self._telemetry: deque[_Lane] = deque()  # lanes that hold nothing else
        self._taken = 0
        self._count = 0
        self._bytes = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._ready = threading.Condition()
        self.dropped = 0
        """Messages that found it full."""

    def offer(self, event: Event) -> None:
        """Take an event in; never blocks. Connections and their ends always find a place."""
        if not isinstance(event, Received):
            self._put(event, "", 0)
            return
        size = len(event.payload)
        if self.box.skips(event.topic, size):
            return
        name, kind = _lane_of(event.topic)
        if not self._put(event, name, size, kind) and name:
            self.box.dropped(event.topic)

    def _put(self, event: Event, name: str, size: int, kind: str = "") -> bool:
        """Whether the sender's share had room for it, or was not what was too small."""
        with self._ready:
            lane = self._lanes.get(name)
            if isinstance(event, Received):
                most = self._max_messages * _ROOM.get(kind, 1)
                full = self._bytes + size > self._max_bytes or self._count >= most
                too_much = lane is not None and bool(name) and self._over_share(lane, size)
                if too_much:
                    return False
                if full:
                    self.dropped += 1
                    return True
            if lane is None:
                turns = self._telemetry if kind == _TELEMETRY else self._turns
                lane = self._lanes[name] = _Lane(name, turns)
                turns.append(lane)
            lane.events.append(event)
            lane.bytes += size
            self._count += 1
            self._bytes += size
            self._ready.notify()
            return True

    def take(self, timeout_s: float, *, most: int = 64) -> list[Event]:
        """Up to ``most`` events, one of each sender in turn; waits so long for the first."""
        with self._ready:
            self._ready.wait_for(lambda: bool(self._count), timeout_s)
            return [self._next() for _ in range(min(most, self._count))]

    def _over_share(self, lane: _Lane, size: int) -> bool:
        return len(lane.events) >= SHARE_MESSAGES or lane.bytes + size > self._share_bytes

    def _next(self) -> Event:
        self._taken += 1
        telemetry = self._telemetry and (not self._turns or self._taken % _TELEMETRY_EVERY == 0)
        lane = (self._telemetry if telemetry else self._turns).popleft()
        event = lane.events.popleft()
        size = len(event.payload) if isinstance(event, Received) else 0
        lane.bytes -= size
        self._count -= 1
        self._bytes -= size
        if lane.events:
            lane.turns.append(lane)
        else:
            del self._lanes[lane.name]
        return event

    def __len__(self) -> int:
        return self._count


def _lane_of(topic: str) -> tuple[str, str]:
    """In whose lane a message waits, and its kind; both empty if it is no device's."""
    if "/up/" not in topic:
        return "", ""
    sender, _, kind = topic.rpartition("/")
    return topic if kind == _TELEMETRY else sender, kind


Policies: TypeAlias = Mapping[str, AbstractSet[str]]
"""By tier, the token-sampling policies of earlier plans: devices may still hold what they made by these."""


class Examined(NamedTuple):
    """What a device's outbox held, and passed."""

    batch: ActivationBatch | AdapterMessage
    """As it was sent."""
    values: Floats | None = None
    """[B, T, d]: its activations, dequantised, if it has any."""
    means: Floats | None = None
    """[B, K, d]: each row's mean vector at each tap, the same whatever policy made the vectors."""


def examine(payload: bytes, tier_name: str, plan: Plan, earlier: Policies = _NONE) -> Examined:
    """Decode a batch and hold it against the plan; return also what devices are compared by.

    Raises:
        Refused: whatever the payload is, if it is not a batch that the journal may keep.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise Refused(Reason.OVERSIZE, f"{len(payload)} bytes; a message holds at most {MAX_MESSAGE_BYTES}")
    try:
        batch = unpack(ActivationBatch, payload)
    except DecodeError as exc:
        raise Refused(Reason.UNDECODABLE, str(exc)) from exc
    _check_plan(batch, tier_name, plan, earlier.get(tier_name, frozenset()))
    try:
        values = decode(batch.activations)
    except DecodeError as exc:
        raise Refused(Reason.NONFINITE, str(exc), batch) from exc
    largest = float(np.abs(values).max(initial=0.0))
    if largest > MAX_ACTIVATION:
        raise Refused(Reason.NONFINITE, f"an activation of {largest:.3g}: no backbone has such", batch)
    return Examined(batch, values, row_means(values, batch.row_lengths))


def arrived(batch: ActivationBatch | AdapterMessage, payload: bytes, tier: str, device: str) -> Arrived:
    """What a device sent as the journal sees it.

    Args:
        batch: What came,
        payload: as it was written.
        tier: Where it came from,
        device: and from whom.
    """
    if not isinstance(batch, ActivationBatch):
        return adapter_arrived(batch, payload, tier, device)
    part = batch.part
    return Arrived(
        tier=tier,
        device=device,
        stream=batch.stream,
        sequence=batch.sequence,
        floor=batch.floor,
        content=content_digest(batch),
        previous=batch.previous,
        samples=len(batch.sample_ids),
        keys=batch.sample_keys,
        payload=payload,
        select=lambda rows: pack(batch.select(rows)),
        counts=part is None or part.pass_number == 0,
        repeat=repeat_of(batch.stream, batch.sequence, part) if part is not None else b"",
    )


def row_means(vectors: Floats, lengths: npt.NDArray[np.integer[Any]]) -> Floats:
    """Each row's mean vector at each tap.

    Args:
        vectors: [B, T, d].
        lengths: [K]: vectors of each row, which add up to T.
    """
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    sums = np.add.reduceat(vectors, starts, axis=1)  # [B, K, d]
    return np.asarray(sums / lengths[None, :, None], np.float32)


def _check_plan(batch: ActivationBatch, tier_name: str, plan: Plan, earlier: AbstractSet[str]) -> None:
    tier = plan.tiers.get(tier_name)
    if tier is None:
        raise Refused(Reason.UNKNOWN_TIER, f"the plan has no tier {tier_name!r}")
    if not plan.ready_for(tier_name):
        raise Refused(Reason.MISMATCH, f"labels or tier {tier_name!r} are not settled yet")
    if batch.fingerprint != tier.fingerprint:
        raise Refused(
            Reason.FINGERPRINT,
            f"backbone {batch.fingerprint[:16]!r} is not tier {tier_name!r}'s {tier.fingerprint[:16]!r}",
            batch,
        )
    if batch.labels_id != labels_id(plan.labels):
        raise Refused(Reason.MISMATCH, "targets index another label list than the plan's", batch)
    width = batch.activations.shape[2]
    if batch.taps != tier.taps or width != tier.width:
        raise Refused(
            Reason.MISMATCH,
            f"taps {list(batch.taps[:16])}, width {width}: the plan has {list(tier.taps)}, {tier.width}",
            batch,
        )
    if batch.activations.codec.stages and batch.activations.codebooks != tier.codebooks_id:
        raise Refused(Reason.MISMATCH, "written with other codebooks than the plan's", batch)
    _check_split(batch, plan)
    if batch.target_form is not TASKS[plan.task].form:
        raise Refused(
            Reason.MISMATCH, f"{batch.target_form.value} are no targets for {plan.task.value}", batch
        )
    try:
        known = tier.vocabulary if TASKS[plan.task].generates else len(plan.labels)
        check_targets(batch.target_form, batch.read_targets(), known)
    except DecodeError as exc:
        raise Refused(Reason.MISMATCH, str(exc), batch) from exc
    _check_sampling(batch, tier, plan.task, earlier)


def _check_split(batch: ActivationBatch, plan: Plan) -> None:
    """That a batch says what a split job needs to know of it, and nothing of the kind in another."""
    if isinstance(plan.method, Split) != (batch.part is not None):
        raise Refused(Reason.MISMATCH, "a batch of another method than the plan's", batch)
    if batch.part is None:
        return
    if why := misplaced(batch.part, plan):
        raise Refused(Reason.MISMATCH, why, batch)
    if len(batch.sample_keys) != len(batch.sample_ids):
        raise Refused(Reason.MISMATCH, "a split job's rows each have a key", batch)


def _check_sampling(batch: ActivationBatch, tier: TierPlan, task: Task, earlier: AbstractSet[str]) -> None:
    """A policy of the plan's, the tier's own or one of its ladder, or of a plan before it; and kept to."""
    try:
        sampling = parse_sampling(batch.sampling)
    except ConfigError as exc:
        raise Refused(Reason.MISMATCH, str(exc), batch) from exc
    policies = tier.policies(task)
    if batch.sampling not in policies and batch.sampling not in earlier:
        known = ", ".join(sorted(policies))
        raise Refused(Reason.MISMATCH, f"{batch.sampling} is no policy of the plan's: {known}", batch)
    if task is Task.TOKEN_CLASSIFICATION and sampling.kind != "all":
        raise Refused(Reason.MISMATCH, f"{task.value} needs every vector, not {batch.sampling}", batch)
    longest, most = int(batch.row_lengths.max()), sampling.most_tokens(tier.max_tokens)
    if longest > most:
        text = f"a row of {longest} vectors: {batch.sampling} gives no more than {most} of the plan's "
        raise Refused(Reason.MISMATCH, f"{text}{tier.max_tokens}", batch)
