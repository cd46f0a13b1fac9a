"""Who sends junk pays for it: a topic on which too much is refused is not heard for a while.

The ingest thread charges what it refuses, and the inbox what finds its sender's share full. A topic that owes
too much is skipped where its messages come in, at next to no cost, and longer each time. One on which
a flood goes on even so is named, for subscriptions that leave it out.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

_MOST_TOPICS: Final = 10_000
_CREDIT: Final = 100.0
_EARNED_PER_S: Final = 2.0
_BYTES_A_POINT: Final = 32 * 1024
_A_MESSAGE: Final = 0.1
"""What a refused message costs beside its bytes: a small one is refused in a fraction of a millisecond."""
_TOLD: Final = 1 / 8
"""What a refusal costs that its device is told of: an honest one drops the batch."""
_OVERFLOW: Final = _CREDIT / 4
_FIRST_S: Final = 30.0
_LONGEST_S: Final = 3600.0
_FORGIVEN_S: Final = 3600.0
"""So long after a penalty the next one is a first one again."""
_FLOOD_MESSAGES: Final = 32
_FLOOD_MESSAGES_PER_S: Final = 500.0
_FLOOD_BYTES_PER_S: Final = 4 * 2**20


class Penalty(NamedTuple):
    """A topic that is not heard for a while."""

    topic: str
    seconds: float


class _Account:
    def __init__(self, now: float) -> None:
        self.credit, self.at_s = _CREDIT, now
        self.since_s = self.until_s = 0.0
        self.length_s = 0.0
        self.messages = self.bytes = 0  # skipped since then
        self.flood = False

    def pay(self, price: float, now: float) -> bool:
        """Whether the credit is used up by it."""
        self.credit = min(_CREDIT, self.credit + (now - self.at_s) * _EARNED_PER_S) - price
        self.at_s = now
        return self.credit < 0

    def punish(self, now: float) -> None:
        again = now - self.until_s < _FORGIVEN_S and self.length_s > 0
        self.length_s = min(2 * self.length_s, _LONGEST_S) if again else _FIRST_S
        self.since_s, self.until_s = now, now + self.length_s
        self.credit, self.at_s = _CREDIT, self.until_s
        self.messages = self.bytes = 0
        self.flood = False


class PenaltyBox:
    """Safe between threads.

    Args:
        clock: Seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._inside: dict[str, _Account] = {}
        self._new: list[Penalty] = []
        self._skipped: Counter[str] = Counter()

    def dropped(self, topic: str) -> None:
        """A message found its sender's share full, which is larger than any honest sender's window."""
        self._charge(topic, _OVERFLOW)
        with self._lock:
            self._skipped[topic.rpartition("/")[2]] += 1

    def charge(self, topic: str, size: int, *, told: bool = False) -> None:
        """A message on a topic was junk.

        Args:
            topic: Where it came.
            size: Its bytes.
            told: Its device will hear so, and what an honest one does then.
        """
        self._charge(topic, (_A_MESSAGE + size / _BYTES_A_POINT) * (_TOLD if told else 1.0))

    def _charge(self, topic: str, price: float) -> None:
        now = self._clock()
        with self._lock:
            account = self._accounts.setdefault(topic, _Account(now))
            self._accounts.move_to_end(topic)
            if len(self._accounts) > _MOST_TOPICS:
                self._accounts.popitem(last=False)
            if topic not in self._inside and account.pay(price, now):
                account.punish(now)
                self._inside[topic] = account
                self._new.append(Penalty(topic, account.length_s))

    def skips(self, topic: str, size: int) -> bool:
        """Whether a message is to be thrown away unread, because of where it came."""
        if topic not in self._inside:  # without the lock: nearly always, and nothing hangs on one more
            return False
        with self._lock:
            account = self._inside.get(topic)
            if account is None:
                return False
            account.messages += 1
            account.bytes += size
            self._skipped[topic.rpartition("/")[2]] += 1
            return True

    def tick(self) -> None:
        """Let out whose time is over, and see who goes on regardless."""
        now = self._clock()
        with self._lock:
            for topic in [topic for topic, one in self._inside.items() if now >= one.until_s]:
                del self._inside[topic]
            for account in self._inside.values():
                seconds = max(now - account.since_s, 0.05)
                account.flood = account.flood or (
                    account.messages >= _FLOOD_MESSAGES
                    and (
                        account.messages > seconds * _FLOOD_MESSAGES_PER_S
                        or account.bytes > seconds * _FLOOD_BYTES_PER_S
                    )
                )

    def __len__(self) -> int:
        return len(self._inside)

    @property
    def floods(self) -> frozenset[str]:
        """Topics on which a flood goes on though nobody listens."""
        with self._lock:
            return frozenset(topic for topic, account in self._inside.items() if account.flood)

    def news(self) -> list[Penalty]:
        """Penalties since the last time that this was asked."""
        with self._lock:
            new, self._new = self._new, []
            return new

    def skipped(self) -> Counter[str]:
        """Messages that were thrown away since the last time that this was asked, by kind."""
        with self._lock:
            skipped, self._skipped = self._skipped, Counter()
            return skipped
