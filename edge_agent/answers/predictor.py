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
import numpy as np

from edge_agent.answers.answer import Answer, answers_of
from edge_agent.answers.generator import Generator, read_options
from edge_agent.batches.targets import Unusable, targets_of
from edge_agent.weights.adopted import Adopted, load_adopted
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.language_model import LanguageModel
from sidestream.backbone.runtimes import RuntimeChoice, shared_backbone
from sidestream.backbone.sampled import Sampled
from sidestream.backbone.text import Text
from sidestream.contract.errors import DataError, StateError, WireError
from sidestream.contract.quality import Tally
from sidestream.contract.sampling import parse_sampling
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import Bundle, decode_bundle, digest
from sidestream.side_network.exported import INDEX, WEIGHTS, Exported
from sidestream.side_network.inference import InferenceNetwork

_ROWS = 32


def load_exported(folder: str | Path, *, backbone: str = "", runtime: RuntimeChoice = "auto") -> Predictor:
    """Load what ``sidestream trainer export --format hf`` wrote; the machine need never have been an agent.

    Args:
        folder: The exported folder.
        backbone: Where the backbone is now, if it has moved since; an exported one takes no torch.
        runtime: What computes it.

    Raises:
        StateError: there is no such export, or it is damaged.
        BackboneError: the backbone cannot be loaded, or is not the one the weights were trained for.
    """
    place = Path(folder).expanduser()
    try:
        exported = msgspec.json.decode((place / INDEX).read_bytes(), type=Exported)
        data = (place / WEIGHTS).read_bytes()
        bundle = decode_bundle(data)
    except (OSError, msgspec.MsgspecError, WireError) as exc:
        raise StateError(f"{place}: is no export that can be read: {exc}") from exc
    if digest(data) != exported.weights_digest:
        raise StateError(f"{place}: the weights are damaged; export them again")
    tier, task = exported.tier_plan, bundle.about.task
    if not (reference := backbone or tier.backbone):
        raise StateError(f"{place}: does not say where its backbone is; give backbone=")
    adopted = Adopted(
        run=bundle.about.run,
        version=bundle.about.version,
        bundle_digest=exported.weights_digest,
        state_digest="",
        tier=exported.tier,
        tier_plan=tier,
        backbone=reference,
    )
    frozen = shared_backbone(reference, tier.layers, tier.precision, task, runtime=runtime)
    return Predictor(adopted, bundle, frozen)


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
        if isinstance(texts, str) or not all(map(_is_text, texts)):
            raise TypeError('predict takes a list of texts: predict(["dim the lights"])')
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

    def forward(self, texts: Sequence[Text]) -> Floats:
        """The side-network's numbers: logits [K, C]; [V, C], one for each word's vector; or [K, 1]."""
        parts = (self._numbers(texts[start : start + _ROWS])[0] for start in range(0, len(texts), _ROWS))
        return np.concatenate(list(parts))

    def score(self, texts: Sequence[Text], labels: Sequence[str]) -> tuple[list[Any], Tally]:
        """Answers, and how good they are.

        Args:
            texts: As :meth:`predict` takes them.
            labels: What is true, as it stands in data: for each text.

        Raises:
            DataError: a label is none of the task's form.
        """
        targets, answers, tally = targets_of(self.task, self.labels), list[Any](), Tally()
        for start in range(0, len(texts), _ROWS):
            some = texts[start : start + _ROWS]
            numbers, sampled = self._numbers(some)
            answers += answers_of(self.task, self.labels, numbers, sampled, some, self._network.scale)
            try:
                truths = [
                    targets.read(label, text if isinstance(text, str) else text[0], judge=True)
                    for label, text in zip(labels[start : start + _ROWS], some, strict=True)
                ]
            except Unusable as exc:
                raise DataError(f"labels: {exc}") from exc
            tally += targets.tally(numbers, targets.stack(truths, sampled), self._network.scale)
        return answers, tally

    def _predict(self, texts: Sequence[Text]) -> list[Answer]:
        numbers, sampled = self._numbers(texts)
        return answers_of(self.task, self.labels, numbers, sampled, texts, self._network.scale)

    def _numbers(self, texts: Sequence[Text]) -> tuple[Floats, Sampled]:
        tier = self._tier_plan
        words = self.task is Task.TOKEN_CLASSIFICATION
        sampled = self._backbone.forward(
            texts, tier.taps, tier.max_tokens, lambda lengths: self._sampling, words=words
        )
        return self._network.predict(tier.align, sampled.vectors, sampled.lengths), sampled


def _is_text(value: object) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
    return pair or isinstance(value, str)
