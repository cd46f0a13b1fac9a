"""Where no plan of the job comes: which jobs there are on the broker, for a name that is mistyped.

Asked on a connection of its own: a broker whose access list minds may hang up on that one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from broker_config.transport import Event, Received, Transport
from sidestream.contract.errors import SidestreamError
from sidestream.contract.topics import plans_filter

_AFTER_S: Final = 5.0
_MOST_S: Final = 120.0
_CONNECT_S: Final = 10.0
_KEPT_S: Final = 1.0
_SHOWN: Final = 20
log = logging.getLogger(__name__)


class OtherJobs:
    """Asks on a thread of its own, ever more seldom, until it has found some and said so.

    Args:
        job: Our job's name.
        look: Makes a transport under another client id.
        clock: Seconds.
    """

    def __init__(
        self, job: str, look: Callable[[], Transport], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._job = job
        self._look = look
        self._pause_s = _AFTER_S
        self._next_s = clock() + _AFTER_S
        self._told = False

    def tick(self, now: float, *, waiting: bool) -> None:
        """Ask, if a plan has been waited for long enough."""
        if waiting and not self._told and now >= self._next_s:
            self._pause_s = min(_MOST_S, 2 * self._pause_s)
            self._next_s = now + self._pause_s
            threading.Thread(target=self._tell, name="other-jobs", daemon=True).start()

    def _tell(self) -> None:
        try:
            jobs = jobs_on(self._look())
        except SidestreamError as exc:
            log.debug("not asked for other jobs: %s", exc)
            return
        if jobs and self._job not in jobs:
            self._told = True
            log.warning(
                "there is no plan of job %r on this broker; it has those of: %s. Is the name right?",
                *(self._job, ", ".join(jobs[:_SHOWN])),
            )


def jobs_on(transport: Transport) -> list[str]:
    """The jobs whose plans are retained on a broker, as far as its access list lets one see; closes it."""
    found: set[str] = set()

    def hear(event: Event) -> None:
        if isinstance(event, Received) and event.payload:
            found.add(event.topic.split("/")[-2])

    transport.subscribe(plans_filter())
    try:
        transport.start(hear)
        if transport.wait_connected(_CONNECT_S):
            threading.Event().wait(_KEPT_S)
    finally:
        transport.close()
    return sorted(found)
