"""Frozen backbone and adopted side-network answer questions: offline, without a broker.

import edge_agent
predictor = edge_agent.load("/var/lib/sidestream")
predictor.predict(["turn the lights off"])[0].label
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from contract.bundle import Bundle
from contract.errors import StateError
from contract.sampling import parse_sampling
from contract.side_network import from_bundle
from edge_agent.adopted import Adopted, load_adopted
from edge_agent.backbone import Backbone, shared_backbone

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
    return Predictor(kept.adopted, kept.bundle, shared_backbone(reference, tier.layers, tier.precision))


class Predictor:
    """Answers with label and probability.

    Raises:
        BackboneError: the backbone is not the one the weights were trained for.
    """

    def __init__(self, adopted: Adopted, bundle: Bundle, backbone: Backbone) -> None:
        backbone.check(adopted.tier_plan.fingerprint)
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
        answers: list[Prediction] = []
        for start in range(0, len(texts), _ROWS):
            answers += self._predict(texts[start : start + _ROWS])
        return answers

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
