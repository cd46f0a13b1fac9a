"""What each defence costs: a linear answer, in closed form, from what would be sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from sidestream.backbone.backbone import Backbone
from sidestream.contract.privacy import parse_privacy
from sidestream.leakage.proposals import ridge
from sidestream.leakage.side_attacks import features
from sidestream.leakage.way import Tell, Way, seen, whole

DEFENCES: Final = (
    "",
    "noise:1",
    "deep:2",
    "random:4",
    "mean",
    "deep, mean",
    "mean, noise:1",
    "deep:2, mean, noise:1",
    "deep:2, mean, noise:1.5",
    "deep, mean, noise:2",
    "deep, mean, sketch:64, noise:1",
)
"""What ``--defences`` tries, as ``privacy`` in trainer.toml has it."""


def under(way: Way, privacy: str) -> Way:
    """A way to send with a setting of ``privacy`` on it."""
    found = parse_privacy(privacy)
    return replace(
        way,
        taps=found.kept(way.taps),
        sampling=found.sampling or way.sampling,
        privacy=replace(found, taps=0, sampling="") if str(found) else way.privacy,
    )


class Accuracy:
    """Accuracy of a linear answer under any way to send.

    It says what a way costs next to another; the side-network that a job trains does better with all of them.

    Args:
        backbone: The public one.
        taps: All layers that the ways tap.
        train: Texts and labels to learn from.
        test: Those to be judged by, sent without noise, as a device asks its own model.
        seed: Of all that is drawn.
        tell: Given progress.
    """

    def __init__(
        self,
        backbone: Backbone,
        taps: Sequence[int],
        train: Sequence[tuple[str, str]],
        test: Sequence[tuple[str, str]],
        *,
        seed: int,
        tell: Tell,
    ) -> None:
        self._taps, self._seed, self._is_decoder = taps, seed, backbone.is_decoder
        self._classes = sorted({label for _, label in train})
        self._answers = np.array([[label == one for one in self._classes] for _, label in train], np.float32)
        self._labels = [label for _, label in test]
        self._train, self._test = (
            [one for one in whole(backbone, taps, [text for text, _ in rows], 128, tell) if one is not None]
            for rows in (train, test)
        )

    def of(self, way: Way) -> float:
        """Share answered rightly."""
        rng = np.random.default_rng([self._seed, 5])
        sent = seen(way, self._taps, self._train, rng, is_decoder=self._is_decoder)
        asked = seen(way, self._taps, self._test, rng, is_decoder=self._is_decoder)
        learnt = ridge(features(sent), self._answers)
        told = learnt(features([one._replace(sent=one.clean) for one in asked])).argmax(axis=1)
        return float(
            np.mean([self._classes[one] == label for one, label in zip(told, self._labels, strict=True)])
        )
