"""Frozen backbone and adopted side-network answer questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edge_agent.answers.generator import Generator, read_options
from edge_agent.answers.predicting import Predictor
from edge_agent.weights.adopted import Adopted
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.inputs import Input
from sidestream.backbone.language_model import LanguageModel
from sidestream.backbone.sampled import Sampled
from sidestream.contract.errors import StateError
from sidestream.contract.privacy import parse_privacy
from sidestream.contract.sampling import parse_sampling
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import Bundle
from sidestream.side_network.inference import InferenceNetwork


class SidePredictor(Predictor):
    """Answers with a side-network.

    Args:
        adopted: What was adopted.
        bundle: The side-network.
        backbone: What stands beside it.

    Raises:
        BackboneError: the backbone is not the one the weights were trained for.
    """

    def __init__(self, adopted: Adopted, bundle: Bundle, backbone: Backbone) -> None:
        backbone.check(adopted.tier_plan.fingerprint)
        backbone.check_head(adopted.tier_plan.head)
        about = bundle.about
        super().__init__(version=adopted.version, labels=about.labels, task=about.task, scale=about.scale)
        self._tier_plan = adopted.tier_plan
        self._backbone = backbone
        self._network = InferenceNetwork(bundle)
        self._privacy = parse_privacy(adopted.tier_plan.privacy)
        self._sampling = parse_sampling(adopted.tier_plan.sampling)

    def stream(self, prompt: str, *, frozen: bool = False, **options: Any) -> Iterator[str]:
        model, tier = self._backbone, self._tier_plan
        if not isinstance(model, LanguageModel):
            raise StateError("the adopted weights are no language model's; use predict")
        network = None if frozen else self._network
        return Generator(model, network, tier.align, tier.taps).stream(prompt, read_options(options))

    def _numbers(self, texts: Sequence[Input]) -> tuple[Floats, Sampled]:
        tier = self._tier_plan
        words = self.task is Task.TOKEN_CLASSIFICATION
        sampled = self._backbone.forward(
            texts, tier.taps, tier.max_tokens, lambda lengths: self._sampling, words=words
        )
        vectors = self._privacy.project(sampled.vectors)
        return self._network.predict(tier.align, vectors, sampled.lengths), sampled
