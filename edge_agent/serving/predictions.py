"""Answers with what the agent beside it has adopted last; questions that wait are answered in one pass.

New weights are loaded beside the old ones and take their place between two passes: no question goes without
an answer.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

from edge_agent.answers.predictor import Predictor, load
from sidestream.contract.errors import SidestreamError, StateError
from sidestream.contract.tasks import Modality

MOST_TEXTS: Final = 256
"""In one question."""
_AT_ONCE: Final = 64
_WAITING: Final = 256
_LOOK_S: Final = 1.0
_ANSWER_S: Final = 60.0
log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """Answers, and of which weights."""

    version: int
    answers: list[Any]


class _Question:
    def __init__(self, texts: Sequence[Any]) -> None:
        self.texts = texts
        self.done = threading.Event()
        self.answered: Answered | None = None
        self.failure: Exception | None = None


class Predictions:
    """Ask from any thread. Close it, or use it as a context manager.

    Args:
        state_dir: The agent's.
        load_predictor: Loads what was adopted there; tests give another.
        look_s: Between two looks for new weights.

    Raises:
        StateError: nothing has been adopted.
        BackboneError: the backbone cannot be loaded.
    """

    def __init__(
        self, state_dir: Path, load_predictor: Callable[[Path], Predictor] = load, *, look_s: float = _LOOK_S
    ) -> None:
        self._state_dir = state_dir
        self._load = load_predictor
        self._look_s = look_s
        self._stamp = self._stamp_now()
        self.predictor: Predictor = load_predictor(state_dir)
        """Which is asked at the moment."""
        self._questions: queue.Queue[_Question | None] = queue.Queue(_WAITING)
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("answers", self._answer), ("weights", self._follow))
        ]
        for thread in self._threads:
            thread.start()

    def ask(self, texts: Sequence[Any]) -> Answered:
        """Answer texts, or images by their bytes; several threads' are answered together.

        Raises:
            StateError: too many wait, or the weights answer no such question.
            TypeError: it is not a list of what the job's samples are. Paths are none: whoever asks must not
                have files of this machine opened.
        """
        if self.predictor.modality is Modality.IMAGE and not all(isinstance(one, bytes) for one in texts):
            raise TypeError('this job is about images; ask with their bytes in base64: {"images": ["…"]}')
        if len(texts) > MOST_TEXTS:
            raise StateError(f"{len(texts)} texts in one question; {MOST_TEXTS} at most")
        if not texts:
            return Answered(self.predictor.version, [])
        question = _Question(texts)
        try:
            self._questions.put_nowait(question)
        except queue.Full:
            raise StateError("too many questions wait; ask again in a moment") from None
        if not question.done.wait(_ANSWER_S):
            raise StateError(f"no answer within {_ANSWER_S:g} s")
        if question.failure is not None:
            raise question.failure
        assert question.answered is not None
        return question.answered

    def close(self) -> None:
        """Answer what waits, and stop."""
        self._closing.set()
        self._questions.put(None)
        for thread in self._threads:
            thread.join(_ANSWER_S)

    def _answer(self) -> None:
        while (first := self._questions.get()) is not None:
            together, count = [first], len(first.texts)
            while count < _AT_ONCE:
                try:
                    following = self._questions.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._questions.put(None)
                    break
                together.append(following)
                count += len(following.texts)
            self._answer_together(together)

    def _answer_together(self, together: Sequence[_Question]) -> None:
        predictor = self.predictor
        try:
            answers = predictor.predict([text for one in together for text in one.texts])
        except Exception as exc:  # of one of them, perhaps: each is tried by itself
            for one in together:
                if len(together) > 1:
                    self._answer_together([one])
                else:
                    one.failure = exc
                    one.done.set()
            return
        for one in together:
            one.answered = Answered(predictor.version, answers[: len(one.texts)])
            answers = answers[len(one.texts) :]
            one.done.set()

    def _follow(self) -> None:
        while not self._closing.wait(self._look_s):
            stamp = self._stamp_now()
            if stamp == self._stamp:
                continue
            try:
                self.predictor = self._load(self._state_dir)
                self._stamp = stamp
                log.info("version %d is in use", self.predictor.version)
            except SidestreamError as exc:
                log.warning("new weights cannot be loaded yet: %s", exc)

    def _stamp_now(self) -> tuple[int, int]:
        try:
            found = (self._state_dir / "weights" / "adopted.json").stat()
        except OSError:
            return 0, 0
        return found.st_mtime_ns, found.st_ino

    def __enter__(self) -> Predictions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
