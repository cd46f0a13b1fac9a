"""Questions over MQTT 5: a message with a response topic is answered there, with its correlation data."""

from __future__ import annotations

import logging
import queue
import threading
from types import TracebackType
from typing import Final

from broker_config.connection.connection import Connection
from broker_config.transport import Event, Received
from edge_agent.serving.http import MOST_BYTES, answer_to
from edge_agent.serving.predictions import Predictions
from sidestream.contract.errors import BrokerError

_WAITING: Final = 64
_CLOSE_S: Final = 10.0
log = logging.getLogger(__name__)


class MqttAnswers:
    """Answers until it is closed; a context manager.

    Args:
        predictions: Are asked.
        connection: Not started; it is closed with this.
        topic: Where questions come.
    """

    def __init__(self, predictions: Predictions, connection: Connection, topic: str) -> None:
        self._predictions = predictions
        self._connection = connection
        self._questions: queue.Queue[Received | None] = queue.Queue(_WAITING)
        connection.subscribe(topic)
        connection.start(self._hear)
        self._thread = threading.Thread(target=self._answer, name="mqtt-answers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer what waits, and leave."""
        self._questions.put(None)
        self._thread.join(_CLOSE_S)
        self._connection.close()

    def _hear(self, event: Event) -> None:
        """On the network's thread."""
        wanted = isinstance(event, Received) and event.response_topic and not event.retained
        if not (wanted and isinstance(event, Received) and len(event.payload) <= MOST_BYTES):
            return
        try:
            self._questions.put_nowait(event)
        except queue.Full:
            log.warning("too many questions wait: one is not answered")

    def _answer(self) -> None:
        while (question := self._questions.get()) is not None:
            _, body = answer_to(self._predictions, question.payload)
            try:
                self._connection.answer(question, body)
            except (BrokerError, ValueError) as exc:
                log.warning("a question could not be answered: %s", exc)

    def __enter__(self) -> MqttAnswers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
