"""Questions to the trainer, one after another, over a connection of their own."""

from __future__ import annotations

import logging
import queue
import secrets
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from broker_config.errors import NotConnected
from broker_config.transport import Connected, Event, Received, Transport
from edge_agent.weights.trust import Trust
from sidestream.contract.errors import BrokerError, StateError, WireError
from sidestream.contract.messages import MAX_SLOTS, Query, QueryReply
from sidestream.contract.topics import Topics
from sidestream.contract.wire import TARGET_MESSAGE_BYTES, pack

_HEADERS_BYTES: Final = 1024
_AGAIN_S: Final = 5.0
"""Between two times that a query is sent: a trainer that is just starting has missed the first."""
_LOOK_S: Final = 0.1
log = logging.getLogger(__name__)


class Asker:
    """Asks; a context manager.

    Args:
        transport: Not started; it is closed with this.
        job: The job's name.
        tier: The device's,
        device: and its name.
        trust: Says whether an answer is the trainer's.
        timeout_s: How long to wait for each answer.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        job: str,
        tier: str,
        device: str,
        trust: Trust,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._job = job
        self._device = device
        self._trust = trust
        self._timeout_s = timeout_s
        self._clock = clock
        topics = Topics(job)
        self._topic = topics.query(tier, device)
        self.place = secrets.randbelow(MAX_SLOTS)
        """Where answers are looked for: by lot, so that several who ask are not in each other's way."""
        self.max_bytes = TARGET_MESSAGE_BYTES
        """Of a query, on the present connection."""
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        transport.subscribe(topics.prediction(tier, device, self.place))
        transport.start(self._events.put)
        self._began_s = self._clock()

    def ask(self, query: Query) -> QueryReply:
        """The trainer's answer.

        Raises:
            BrokerError: there is no connection, or no answer in time.
            StateError: the trainer says that it does not answer, and why.
        """
        payload, now = pack(query), self._clock()
        deadline_s, again_s, reached = now + self._timeout_s, now, False
        while (now := self._clock()) < deadline_s:
            if now >= again_s and self._transport.connected:
                again_s = now + _AGAIN_S
                reached = self._say(payload) or reached
            try:
                event = self._events.get(timeout=min(deadline_s, max(again_s, now + _LOOK_S)) - now)
            except queue.Empty:
                continue
            if isinstance(event, Connected):
                self.max_bytes = min(TARGET_MESSAGE_BYTES, event.max_packet_bytes) - _HEADERS_BYTES
                again_s = now
            elif isinstance(event, Received) and (reply := self._read(event, query)) is not None:
                if reply.refused:
                    raise StateError(f"the trainer gives no answer: {reply.refused}")
                return reply
        if not reached:
            why = self._transport.last_error or "no answer"
            raise BrokerError(f"the broker cannot be reached, so the trainer cannot be asked: {why}")
        raise BrokerError(
            f"no answer from the trainer of job {self._job!r} within {self._timeout_s:g} s: see that it "
            "runs, is no older than this agent, and that the broker's access list lets this device ask "
            '("sidestream fleet" writes it so), or raise predict.timeout_s'
        )

    def close(self) -> None:
        """Leave."""
        self._transport.close()

    def _say(self, payload: bytes) -> bool:
        try:
            self._transport.publish(self._topic, payload)
        except NotConnected:  # again with the next connection
            return False
        return True

    def _read(self, event: Received, query: Query) -> QueryReply | None:
        """The answer, if it is one to this query."""
        try:
            reply = self._trust.open_prediction(event.payload, self._device)
        except WireError as exc:
            log.warning("an answer is not used: %s", exc)
            return None
        return reply if (reply.run, reply.mark) == (query.run, query.mark) else None

    def __enter__(self) -> Asker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
