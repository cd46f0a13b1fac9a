"""The trainer's threads: started, watched, and stopped in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from broker_config.transport import Transport
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.presence import Presence
from side_trainer.ingest import Ingest
from side_trainer.learner import Learner
from side_trainer.receive.inbox import Inbox
from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import BrokerError

_JOIN_S: Final = 30.0


class Threads:
    """Starts the threads, waits, and stops them in order: ingest and learner, then goodbye.

    Args:
        config: What the trainer was started with.
        settings_file: Followed, if there is one.
        transport: Connects, and takes leave.
        link: Says when the learner may start.
        inbox: Filled by the transport.
        ingest: Run on a thread,
        learner: and on another.
        presence: Says goodbye.
    """

    def __init__(
        self,
        config: TrainerConfig,
        settings_file: SettingsFile | None,
        transport: Transport,
        link: LeaderTransport,
        inbox: Inbox,
        ingest: Ingest,
        learner: Learner,
        presence: Presence,
    ) -> None:
        self._config = config
        self._settings_file = settings_file
        self._transport = transport
        self._link = link
        self._inbox = inbox
        self._ingest = ingest
        self._learner = learner
        self._presence = presence
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def run(self, stop: threading.Event, started: Callable[[], None]) -> None:
        """Run until ``stop`` is set, or a thread fails; call ``started`` once everything runs."""
        ingest, learner = (
            threading.Thread(target=self._guard, args=(run,), name=name, daemon=True)
            for name, run in (("ingest", self._ingest_all), ("learner", self._learn))
        )
        try:
            self._transport.start(self._inbox.offer)
            self._await_broker(stop)
            ingest.start()
            while not (self._link.confirmed.wait(0.05) or stop.is_set() or self._failure is not None):
                continue
            if self._link.confirmed.is_set():
                learner.start()
                started()
            while not stop.wait(0.2) and self._failure is None:
                self._follow_settings()
        finally:
            self._stop.set()
            for thread in (ingest, learner):
                if thread.ident is not None:
                    thread.join(_JOIN_S)
            self._transport.close(last_words=self._presence.last_words())
        if self._failure is not None:
            raise self._failure

    def _await_broker(self, stop: threading.Event) -> None:
        """Wait for the first connection; after that one the transport reconnects for ever."""
        wait_s = self._config.broker_wait_s
        deadline_s = time.monotonic() + wait_s
        while not stop.is_set() and not self._transport.wait_connected(0.2):
            if wait_s and time.monotonic() > deadline_s:
                raise BrokerError(
                    f"no broker within {wait_s:g} s: {self._transport.last_error}; check broker.url, or set "
                    "broker_wait_s = 0 to wait for ever"
                )

    def _follow_settings(self) -> None:
        if self._settings_file is None:
            return
        updated = self._settings_file.update(self._config, time.monotonic())
        if updated != self._config:
            self._config = updated
            self._learner.reconfigure(updated)
            self._ingest.reconfigure(updated)

    def _learn(self) -> None:
        self._learner.run(self._stop)

    def _ingest_all(self) -> None:
        while not self._stop.is_set():
            self._ingest.step()
            self._ingest.throttle(self._learner.behind)

    def _guard(self, run: Callable[[], None]) -> None:
        """A thread that fails ends the process: a supervisor restarts it, and nothing is lost by that."""
        try:
            run()
        except BaseException as exc:
            self._failure = exc
