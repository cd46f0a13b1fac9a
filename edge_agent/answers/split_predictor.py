"""A whole model with a split job's adapters answers questions, where a device has room for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from edge_agent.answers.generator import Generator, read_options
from edge_agent.answers.predicting import Predictor
from edge_agent.split_lora.reading import bundle_of
from edge_agent.split_lora.whole import load_tuned
from edge_agent.weights.adopted import AdoptedWeights
from sidestream.backbone.inputs import Input
from sidestream.backbone.sampled import Sampled
from sidestream.contract.errors import StateError
from sidestream.contract.tasks import TASKS
from sidestream.contract.tensors import Floats


class SplitPredictor(Predictor):
    """Answers with all layers of the backbone, and the adapters in them.

    Args:
        kept: What an agent adopted.
        backbone: Where the whole backbone is now, if it has moved since.

    Raises:
        StateError: what was adopted is not all that answers take.
        BackboneError: the backbone is not here, or not the one the adapters were trained for.
    """

    def __init__(self, kept: AdoptedWeights, backbone: str = "") -> None:
        adopted, bundle = kept.adopted, bundle_of(kept)
        about = bundle.about
        if not about.whole:
            raise StateError(
                f"version {adopted.version} holds the adapters of this device's {about.cut} layers only: it "
                "can answer once the trainer has nothing left to learn and the agent has adopted that version"
            )
        super().__init__(version=adopted.version, labels=about.labels, task=about.task, scale=about.scale)
        self._max_tokens = adopted.tier_plan.max_tokens
        self._whole = load_tuned(backbone or adopted.backbone, bundle, adopted.tier_plan)

    def stream(self, prompt: str, *, frozen: bool = False, **options: Any) -> Iterator[str]:
        if not TASKS[self.task].generates:
            raise StateError("the adopted weights are no language model's; use predict")
        model = self._whole.language_model(frozen=frozen)
        return Generator(model, None, "", (model.depth,)).stream(prompt, read_options(options))

    def _numbers(self, texts: Sequence[Input]) -> tuple[Floats, Sampled]:
        numbers = self._whole.answers(self._whole.text_input.read(texts, self._max_tokens))
        return numbers, Sampled(vectors=numbers[None], lengths=np.ones(len(texts), np.int64))
