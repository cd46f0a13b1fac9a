"""What was learnt, to answer with: two lines of Python, on a machine that never was an agent.

import sidestream
model = sidestream.load("exported")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from edge_agent.answers.answer import LabelSet, Number, Prediction, WordLabels
from edge_agent.answers.predictor import Predictor, load_exported
from edge_agent.answers.predictor import load as load_adopted
from sidestream.backbone.runtimes import RuntimeChoice
from sidestream.contract.tensors import Floats
from sidestream.side_network.exported import INDEX

Metric: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], Any]
"""A figure of what is true and what was answered, in the same order."""


def load(path: str | Path, *, backbone: str = "", runtime: RuntimeChoice = "auto") -> Model:
    """Load an export, or what an agent adopted.

    Args:
        path: A folder that ``sidestream trainer export --format hf`` wrote, or an agent's state directory.
        backbone: Where the backbone is on this machine, if not where the export says.
        runtime: What computes it: torch, or onnx for a folder of ``sidestream backbone export``.

    Raises:
        StateError: there is nothing to load, or it is damaged.
        BackboneError: the backbone cannot be loaded, or is not the one the weights were trained for.
    """
    place = Path(path).expanduser()
    if (place / INDEX).is_file():
        return Model(load_exported(place, backbone=backbone, runtime=runtime))
    return Model(load_adopted(place, backbone=backbone))


class Model:
    """A frozen backbone with a side-network that was learnt: answers as the job's task has it."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label it may answer with."""
        return tuple(self._predictor.labels)

    @property
    def task(self) -> str:
        """What it was taught, such as ``text-classification``."""
        return self._predictor.task.value

    @property
    def version(self) -> int:
        """Of the weights."""
        return self._predictor.version

    def predict(self, texts: Sequence[Any]) -> list[Any]:
        """Answer each text, or image: a path, or the bytes of a file.

        Returns:
            For each a :class:`Prediction`, or what the task has: a LabelSet, a Number, or WordLabels.
        """
        return self._predictor.predict(texts)

    def forward(self, texts: Sequence[Any]) -> Floats:
        """The numbers behind the answers: logits [K, C] of K texts and C labels, or [K, 1] in regression."""
        return self._predictor.forward(texts)

    def __call__(self, texts: str | Sequence[Any]) -> list[dict[str, Any]]:
        """Answer as a pipeline of transformers does: a list of ``{"label": …, "score": …}``."""
        given = [texts] if isinstance(texts, str) else list(texts)
        return [_as_pipeline(answer) for answer in self.predict(given)]

    def generate(self, prompt: str, **options: Any) -> str:
        """What follows a prompt, in a language-model job; options as ``sidestream agent generate`` has."""
        return self._predictor.generate(prompt, **options)

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """As :meth:`generate`, piece by piece."""
        return self._predictor.stream(prompt, **options)

    def evaluate(
        self, texts: Sequence[Any], labels: Sequence[Any], metrics: Mapping[str, Metric] | None = None
    ) -> dict[str, Any]:
        """How good the answers are, by the task's own measures and by yours.

        Args:
            texts: What to answer.
            labels: What is true, for each text; a list for several labels or words, a number in regression.
            metrics: Functions of truths and answers, by name, such as those of scikit-learn. Answers come as
                plain values: a label's name, a list of them, or a number.

        Returns:
            Figures by name; yours after the task's.

        Raises:
            DataError: a label is none of the task's form.
        """
        if len(texts) != len(labels):
            raise ValueError(f"{len(texts)} texts and {len(labels)} labels")
        answers, tally = self._predictor.score(texts, [_as_text(label) for label in labels])
        plain = [plain_answer(answer) for answer in answers]
        own = {name: metric(labels, plain) for name, metric in (metrics or {}).items()}
        return {**tally.measures(self._predictor.task), **own}


def plain_answer(answer: Any) -> Any:
    """A label's name, a list of them, or a number."""
    if isinstance(answer, Prediction):
        return answer.label
    if isinstance(answer, LabelSet):
        return list(answer.labels)
    if isinstance(answer, Number):
        return answer.value
    return [word.label for word in answer.words] if isinstance(answer, WordLabels) else answer


def _as_pipeline(answer: Any) -> dict[str, Any]:
    if isinstance(answer, Prediction):
        return {"label": answer.label, "score": answer.probability}
    if isinstance(answer, LabelSet):
        return {"labels": list(answer.labels), "scores": list(answer.labels.values())}
    if isinstance(answer, Number):
        return {"score": answer.value}
    return {
        "words": [word.word for word in answer.words],
        "labels": [word.label for word in answer.words],
        "scores": [word.probability for word in answer.words],
    }


def _as_text(label: Any) -> str:
    """A label as it stands in data."""
    import json

    return label if isinstance(label, str) else json.dumps(label, ensure_ascii=False)
