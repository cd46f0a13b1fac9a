"""Frozen backbone and adopted side-network answer questions: offline, without a broker.

import edge_agent
predictor = edge_agent.load("/var/lib/sidestream")
predictor.predict(["turn the lights off"])[0].label

With a language model's weights it is ``edge_agent.load(...).generate("To be, or")``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from contract.bundle import Bundle
from contract.errors import StateError
from contract.sampling import parse_sampling
from contract.side_network import from_bundle
from contract.tasks import TASKS
from edge_agent.adopted import Adopted, load_adopted
from edge_agent.backbone import Backbone, shared_backbone
from edge_agent.generator import Generator, read_options
from edge_agent.language_model import LanguageModel, shared_language_model

_ROWS = 32


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """An answer."""

    label: str
    """The label's name."""
    probability: float
    """What the side-network gives it, 0 to 1."""


def load(state_dir: str | Path, *, backbone: str = "") -> Predictor:
    """Load what an agent has adopted in its state directory; the agent may be running.

    Args:
        state_dir: The agent's state directory.
        backbone: Where the backbone is now, if it has moved since.

    Raises:
        StateError: nothing has been adopted there, or it is damaged.
        BackboneError: the backbone cannot be loaded, or is not the one the weights were trained for.
    """
    folder = Path(state_dir).expanduser()
    if not folder.is_dir():
        raise StateError(f"{folder}: there is no such state directory")
    kept = load_adopted(folder)
    if kept is None:
        raise StateError(
            f"{folder}: no weights have been adopted yet; run the agent until it logs that it did"
        )
    reference = backbone or kept.adopted.backbone
    tier = kept.adopted.tier_plan
    generates = TASKS[kept.bundle.about.task].generates
    read = shared_language_model if generates else shared_backbone
    return Predictor(kept.adopted, kept.bundle, read(reference, tier.layers, tier.precision))


class Predictor:
    """Answers with label and probability.

    Raises:
        BackboneError: the backbone is not the one the weights were trained for.
    """

    def __init__(self, adopted: Adopted, bundle: Bundle, backbone: Backbone) -> None:
        backbone.check(adopted.tier_plan.fingerprint)
        if isinstance(backbone, LanguageModel):
            backbone.check_head(adopted.tier_plan.head)
        self.version = adopted.version
        """Of the weights."""
        self.labels = bundle.about.labels
        """Every label it may answer with."""
        self._tier_plan = adopted.tier_plan
        self._backbone = backbone
        self._network = from_bundle(bundle)
        self._sampling = parse_sampling(adopted.tier_plan.sampling)

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Answer each text with the likeliest label.

        Raises:
            TypeError: ``texts`` is a single text, or holds something else than texts.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError('predict takes a list of texts: predict(["dim the lights"])')
        if isinstance(self._backbone, LanguageModel):
            raise StateError("the adopted weights are a language model's; use generate")
        answers: list[Prediction] = []
        for start in range(0, len(texts), _ROWS):
            answers += self._predict(texts[start : start + _ROWS])
        return answers

    def generate(self, prompt: str, **options: Any) -> str:
        """What follows a prompt, in a language-model job.

        Args:
            prompt: Where to go on from.
            options: Those of :class:`edge_agent.generator.GenerationOptions`: max_tokens, temperature, top_k,
                top_p, seed, stop.

        Raises:
            StateError: the job is no language model's.
            ConfigError: an option is none, or the prompt is empty or too long.
        """
        return "".join(self.stream(prompt, **options))

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """As :meth:`generate`, piece by piece as it comes."""
        model, tier = self._backbone, self._tier_plan
        if not isinstance(model, LanguageModel):
            raise StateError("the adopted weights are no language model's; use predict")
        return Generator(model, self._network, tier.align, tier.taps).stream(prompt, read_options(options))

    def _predict(self, texts: Sequence[str]) -> list[Prediction]:
        tier = self._tier_plan
        sampled = self._backbone.forward(texts, tier.taps, tier.max_tokens, lambda lengths: self._sampling)
        with torch.inference_mode():
            logits = self._network.predict(tier.align, sampled.values, sampled.mask)
            best = torch.softmax(logits, dim=1).max(dim=1)
        return [
            Prediction(label=self.labels[index], probability=probability)
            for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
