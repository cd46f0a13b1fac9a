"""What answers with adopted weights, whatever their method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from edge_agent.answers.answer import Answer, answers_of
from edge_agent.answers.asked import as_inputs
from edge_agent.batches.targets import Unusable, targets_of
from sidestream.backbone.inputs import Input, text_of
from sidestream.backbone.sampled import Sampled
from sidestream.contract.errors import DataError, StateError
from sidestream.contract.quality import Tally
from sidestream.contract.tasks import TASKS, Modality, Scale, Task
from sidestream.contract.tensors import Floats

_ROWS: Final = 32


class Predictor(ABC):
    """Answers as the job's task has it (:mod:`edge_agent.answers.answer`).

    Args:
        version: Of the weights.
        labels: Every label there is.
        task: What was learnt.
        scale: The measure of a regression's numbers.
    """

    def __init__(self, *, version: int, labels: Sequence[str], task: Task, scale: Scale) -> None:
        self.version = version
        """Of the weights."""
        self.labels = tuple(labels)
        """Every label it may answer with."""
        self.task = task
        """What it was taught."""
        self._scale = scale

    @property
    def modality(self) -> Modality:
        """What it is asked about."""
        return TASKS[self.task].modality

    def predict(self, asked: Sequence[Any]) -> list[Any]:
        """Answer each text or image: with a Prediction, or what the task has (:data:`.answer.Answer`).

        Args:
            asked: A list of them; a pair of texts is a tuple. In token classification, words stand between
                white space. An image is a path, or the bytes of a file.

        Raises:
            TypeError: ``asked`` is a single text, or holds something else than the job's samples are.
            DataError: an image cannot be read.
        """
        inputs = as_inputs(asked, self.modality)
        if TASKS[self.task].generates:
            raise StateError("the adopted weights are a language model's; use generate")
        answers: list[Answer] = []
        for start in range(0, len(inputs), _ROWS):
            some = inputs[start : start + _ROWS]
            numbers, sampled = self._numbers(some)
            answers += answers_of(self.task, self.labels, numbers, sampled, some, self._scale)
        return answers

    def generate(self, prompt: str, *, frozen: bool = False, **options: Any) -> str:
        """What follows a prompt, in a language-model job.

        Args:
            prompt: Where to go on from.
            frozen: By the decoder alone, as it was before anything was learnt, to compare with.
            options: Those of :class:`.generator.GenerationOptions`: max_tokens, temperature, top_k,
                top_p, seed, stop.

        Raises:
            StateError: the job is no language model's.
            ConfigError: an option is none, or the prompt is empty or too long.
        """
        return "".join(self.stream(prompt, frozen=frozen, **options))

    @abstractmethod
    def stream(self, prompt: str, *, frozen: bool = False, **options: Any) -> Iterator[str]:
        """As :meth:`generate`, piece by piece as it comes."""

    def forward(self, asked: Sequence[Any]) -> Floats:
        """The numbers behind the answers: logits [K, C]; [V, C], one for each word's vector; or [K, 1]."""
        inputs = as_inputs(asked, self.modality)
        parts = (self._numbers(inputs[start : start + _ROWS])[0] for start in range(0, len(inputs), _ROWS))
        return np.concatenate(list(parts))

    def score(self, asked: Sequence[Any], labels: Sequence[str]) -> tuple[list[Any], Tally]:
        """Answers, and how good they are.

        Args:
            asked: As :meth:`predict` takes them.
            labels: What is true, as it stands in data: for each.

        Raises:
            DataError: a label is none of the task's form.
        """
        inputs = as_inputs(asked, self.modality)
        targets, answers, tally = targets_of(self.task, self.labels), list[Any](), Tally()
        for start in range(0, len(inputs), _ROWS):
            some = inputs[start : start + _ROWS]
            numbers, sampled = self._numbers(some)
            answers += answers_of(self.task, self.labels, numbers, sampled, some, self._scale)
            try:
                truths = [
                    targets.read(label, text_of(text), judge=True)
                    for label, text in zip(labels[start : start + _ROWS], some, strict=True)
                ]
            except Unusable as exc:
                raise DataError(f"labels: {exc}") from exc
            tally += targets.tally(numbers, targets.stack(truths, sampled), self._scale)
        return answers, tally

    @abstractmethod
    def _numbers(self, texts: Sequence[Input]) -> tuple[Floats, Sampled]:
        """[K, C], [V, C] or [K, 1], and what they were computed from."""
