"""Queries of devices: taken in as they come, and answered between two steps of learning.

Nobody who asks holds up what is learnt. What waits is bounded, for each device and in all; devices take
turns; and while there is something to learn, answers take a share of the time, and no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from broker_config.transport import Received
from metrics.catalogue import Asked, Content, TrainerMetrics
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.method import Method
from side_trainer.queries.checking import why_not
from side_trainer.settings.split import PredictConfig
from sidestream.contract.errors import BrokerError, SidestreamError, StateError
from sidestream.contract.messages import Query, QueryReply
from sidestream.contract.plan import Plan
from sidestream.contract.tensors import Codec, decode, encode
from sidestream.contract.topics import Topics, Uplink
from sidestream.contract.wire import unpack

MOST_OF_ONE: Final = 4
"""Queries of a device that may wait: an honest one asks again once it is answered."""
MOST_BYTES: Final = 32 * 2**20
"""Of all queries that wait."""
NOT_ALLOWED: Final = (
    "this trainer does not predict for devices; its operator may allow it, with remote = true in the table "
    "[predict] of trainer.toml"
)
_PATIENCE_S: Final = 1.0
_REASON_CHARS: Final = 500
_log = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    """A query, and why it is refused; empty if it is not."""

    uplink: Uplink
    query: Query
    why: str
    size: int


class Queries:
    """The ingest thread puts in, the learner's thread answers.

    Args:
        config: Whether, and how much of the time.
        link: Where to.
        topics: The job's.
        signer: Signs answers.
        metrics: Counts them.
        run: The journal's id.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        config: PredictConfig,
        link: LeaderTransport,
        topics: Topics,
        signer: TrainerSigner,
        metrics: TrainerMetrics,
        run: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._link = link
        self._topics = topics
        self._signer = signer
        self._metrics = metrics
        self._run = run
        self._clock = clock
        self._lock = threading.Lock()
        self._lanes: dict[Uplink, deque[_Waiting]] = {}
        self._turns: deque[Uplink] = deque()
        self._bytes = 0
        self._resting_until_s = 0.0

    def __len__(self) -> int:
        return sum(map(len, list(self._lanes.values())))

    def put(self, uplink: Uplink, event: Received, plan: Plan) -> None:
        """Take a query in, or drop it where too many wait.

        Raises:
            DecodeError: it is none.
        """
        if event.retained:  # who asked is not there to be answered
            return
        query = unpack(Query, event.payload)
        why = why_not(query, uplink.tier, plan) if self._config.remote else NOT_ALLOWED
        one = _Waiting(uplink, query, why, len(event.payload))
        with self._lock:
            lane = self._lanes.get(uplink)
            if lane is not None and any(waiting.query.mark == query.mark for waiting in lane):
                return  # it was sent once more
            full = lane is not None and len(lane) >= MOST_OF_ONE
            if full or self._bytes + one.size > MOST_BYTES:
                self._metrics.queries.labels(Asked.DROPPED).inc()
                return
            if lane is None:
                lane = self._lanes[uplink] = deque()
                self._turns.append(uplink)
            lane.append(one)
            self._bytes += one.size

    def answer(self, method: Method | None, version: int, *, learning: bool) -> bool:
        """Answer one query, if one waits and it is time; return whether one was.

        Args:
            method: What answers; None before there is one.
            version: Of its weights.
            learning: Whether there is something to learn, for which time is to be left.
        """
        if learning and self._clock() < self._resting_until_s:
            return False
        one = self._next()
        if one is None:
            return False
        began = self._clock()
        reply = self._reply(one, method, version)
        self._publish(one, reply)
        took = self._clock() - began
        self._resting_until_s = began + took / self._config.share
        self._metrics.queries.labels(Asked.REFUSED if reply.refused else Asked.ANSWERED).inc()
        return True

    def _next(self) -> _Waiting | None:
        with self._lock:
            if not self._turns:
                return None
            uplink = self._turns.popleft()
            lane = self._lanes[uplink]
            one = lane.popleft()
            self._bytes -= one.size
            if lane:
                self._turns.append(uplink)
            else:
                del self._lanes[uplink]
            return one

    def _reply(self, one: _Waiting, method: Method | None, version: int) -> QueryReply:
        try:
            if one.why:
                raise StateError(one.why)
            if method is None:
                raise StateError("the trainer has learnt nothing yet")
            states, lengths = decode(one.query.states), one.query.text_lengths
            found = method.answers(one.uplink.tier, states, lengths)
            numbers = encode(found.numbers, Codec.F32)
        except (SidestreamError, ValueError) as exc:  # ValueError: the answer is not finite
            why = str(exc)[:_REASON_CHARS] or type(exc).__name__
            return QueryReply(run=self._run, mark=one.query.mark, version=version, refused=why)
        return QueryReply(
            run=self._run, mark=one.query.mark, version=version, numbers=numbers, scale=found.scale
        )

    def _publish(self, one: _Waiting, reply: QueryReply) -> None:
        tier, device = one.uplink.tier, one.uplink.device
        topic = self._topics.prediction(tier, device, one.query.place)
        payload = self._signer.prediction(reply, tier, device)
        try:
            self._link.publish(topic, payload, timeout_s=_PATIENCE_S)
        except BrokerError as exc:  # whoever asked asks again, or gives up
            _log.debug("not sent to %s: %s", topic, exc)
            return
        self._metrics.down_bytes.labels(tier, Content.PREDICTION).inc(len(payload))
