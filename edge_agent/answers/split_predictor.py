"""A whole model with a split job's adapters answers questions, where a device has room for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from edge_agent.answers.answer import Answer, answers_of
from edge_agent.answers.generator import Generator, read_options
from edge_agent.answers.texts import check_texts
from edge_agent.split_lora.reading import bundle_of
from edge_agent.split_lora.whole import load_tuned
from edge_agent.weights.adopted import AdoptedWeights
from sidestream.backbone.sampled import Sampled
from sidestream.backbone.text import Text
from sidestream.contract.errors import StateError
from sidestream.contract.tasks import TASKS

_ROWS: Final = 32


class SplitPredictor:
    """Answers as :class:`edge_agent.answers.predictor.Predictor` does.

    Args:
        kept: What an agent adopted.
        backbone: Where the whole backbone is now, if it has moved since.

    Raises:
        StateError: what was adopted is not all that answers take.
        BackboneError: the backbone is not here, or not the one the adapters were trained for.
    """

    def __init__(self, kept: AdoptedWeights, backbone: str = "") -> None:
        adopted, bundle = kept.adopted, bundle_of(kept)
        if not bundle.about.whole:
            raise StateError(
                f"version {adopted.version} holds the adapters of this device's {bundle.about.cut} layers "
                "only: it can answer once the trainer has nothing left to learn and the agent has adopted "
                "that version"
            )
        self.version = adopted.version
        """Of the weights."""
        self.labels = bundle.about.labels
        """Every label it may answer with."""
        self.task = bundle.about.task
        """What it was taught."""
        self._about = bundle.about
        self._tier = adopted.tier_plan
        self._whole = load_tuned(backbone or adopted.backbone, bundle, adopted.tier_plan)

    def predict(self, texts: Sequence[Text]) -> list[Any]:
        """Answer each text: with a Prediction, or what the task has (:data:`.answer.Answer`).

        Args:
            texts: A list of them; a pair of texts is a tuple.

        Raises:
            TypeError: ``texts`` is a single text, or holds something else than texts and pairs.
        """
        check_texts(texts)
        if TASKS[self.task].generates:
            raise StateError("the adopted weights are a language model's; use generate")
        answers: list[Answer] = []
        for start in range(0, len(texts), _ROWS):
            some = texts[start : start + _ROWS]
            numbers = self._whole.answers(self._whole.text_input.read(some, self._tier.max_tokens))
            sampled = Sampled(vectors=numbers[None], lengths=np.ones(len(some), np.int64))
            answers += answers_of(self.task, self.labels, numbers, sampled, some, self._about.scale)
        return answers

    def generate(self, prompt: str, *, frozen: bool = False, **options: Any) -> str:
        """What follows a prompt: see :meth:`edge_agent.answers.predictor.Predictor.generate`."""
        return "".join(self.stream(prompt, frozen=frozen, **options))

    def stream(self, prompt: str, *, frozen: bool = False, **options: Any) -> Iterator[str]:
        """As :meth:`generate`, piece by piece as it comes."""
        if not TASKS[self.task].generates:
            raise StateError("the adopted weights are no language model's; use predict")
        model = self._whole.language_model(frozen=frozen)
        return Generator(model, None, "", (model.depth,)).stream(prompt, read_options(options))
