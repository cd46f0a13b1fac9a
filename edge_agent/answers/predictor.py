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

from edge_agent.answers.answer import Answer, answers_of
from edge_agent.answers.generator import Generator, read_options
from edge_agent.answers.split_predictor import SplitPredictor
from edge_agent.answers.texts import check_texts
from edge_agent.weights.adopted import Adopted, load_adopted
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.language_model import LanguageModel
from sidestream.backbone.runtimes import shared_backbone
from sidestream.backbone.text import Text
from sidestream.contract.errors import StateError
from sidestream.contract.plan import Split
from sidestream.contract.sampling import parse_sampling
from sidestream.contract.tasks import Task
from sidestream.side_network.bundle import Bundle
from sidestream.side_network.inference import InferenceNetwork

_ROWS = 32


def load(state_dir: str | Path, *, backbone: str = "") -> Predictor | SplitPredictor:
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
    if isinstance(kept.adopted.method, Split):
        return SplitPredictor(kept, backbone)
    reference = backbone or kept.adopted.backbone
    tier, task = kept.adopted.tier_plan, kept.bundle.about.task
    frozen = shared_backbone(reference, tier.layers, tier.precision, task)
    return Predictor(kept.adopted, kept.bundle, frozen)


class Predictor:
    """Answers as the job's task has it (:mod:`edge_agent.answers.answer`).

    Raises:
        BackboneError: the backbone is not the one the weights were trained for.
    """

    def __init__(self, adopted: Adopted, bundle: Bundle, backbone: Backbone) -> None:
        backbone.check(adopted.tier_plan.fingerprint)
        backbone.check_head(adopted.tier_plan.head)
        self.version = adopted.version
        """Of the weights."""
        self.labels = bundle.about.labels
        """Every label it may answer with."""
        self.task = bundle.about.task
        """What it was taught."""
        self._tier_plan = adopted.tier_plan
        self._backbone = backbone
        self._network = InferenceNetwork(bundle)
        self._sampling = parse_sampling(adopted.tier_plan.sampling)

    def predict(self, texts: Sequence[Text]) -> list[Any]:
        """Answer each text: with a Prediction, or what the task has (:data:`.answer.Answer`).

        Args:
            texts: A list of them; a pair of texts is a tuple. In token classification, words stand between
                white space.

        Raises:
            TypeError: ``texts`` is a single text, or holds something else than texts and pairs.
        """
        check_texts(texts)
        if isinstance(self._backbone, LanguageModel):
            raise StateError("the adopted weights are a language model's; use generate")
        answers: list[Answer] = []
        for start in range(0, len(texts), _ROWS):
            answers += self._predict(texts[start : start + _ROWS])
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

    def stream(self, prompt: str, *, frozen: bool = False, **options: Any) -> Iterator[str]:
        """As :meth:`generate`, piece by piece as it comes."""
        model, tier = self._backbone, self._tier_plan
        if not isinstance(model, LanguageModel):
            raise StateError("the adopted weights are no language model's; use predict")
        network = None if frozen else self._network
        return Generator(model, network, tier.align, tier.taps).stream(prompt, read_options(options))

    def _predict(self, texts: Sequence[Text]) -> list[Answer]:
        tier = self._tier_plan
        words = self.task is Task.TOKEN_CLASSIFICATION
        sampled = self._backbone.forward(
            texts, tier.taps, tier.max_tokens, lambda lengths: self._sampling, words=words
        )
        numbers = self._network.predict(tier.align, sampled.vectors, sampled.lengths)
        return answers_of(self.task, self.labels, numbers, sampled, texts, self._network.scale)
